from contracts import subjects
from contracts.subjects import STREAMS, SUBJECTS


def test_every_subject_has_the_prefix_and_is_listed_once() -> None:
    names = [row.subject for row in SUBJECTS]
    assert len(set(names)) == len(names)
    assert all(name.startswith(subjects.PREFIX) for name in names)


def test_every_stored_subject_lies_in_its_stream_and_control_in_none() -> None:
    streams = {stream.name: stream for stream in STREAMS}
    for row in SUBJECTS:
        if row.stream is None:
            assert ".control." in row.subject
            continue
        prefix = streams[row.stream].subjects[0].removesuffix(">")
        assert row.subject.startswith(prefix)


def test_every_constant_is_a_row() -> None:
    constants = {v for k, v in vars(subjects).items() if k.isupper() and isinstance(v, str) and k != "PREFIX"}
    assert constants == {row.subject for row in SUBJECTS}


def test_progress_subject_matches_the_wildcard() -> None:
    assert subjects.progress("job_1") == "pressroom.progress.job_1"
