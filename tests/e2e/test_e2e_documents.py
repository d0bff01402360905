"""Documents of every kind: handed in, indexed, found, listed, replaced, removed."""

import json

import pytest


def make_pdf(text: str) -> bytes:
    """A PDF of one page, written by hand."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    bodies = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(bodies, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    xref = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(bodies) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(bodies) + 1, xref)
    return bytes(out)


KINDS = {
    "text": ("lighthouse.txt", "text/plain", b"The lighthouse keeper of Skagen polishes the lens every morning."),
    "markdown": (
        "volcano.md",
        "text/markdown",
        b"# Volcanoes\n\nStromboli erupts several times an hour.\n",
    ),
    "html": (
        "clock.html",
        "text/html",
        b"<html><head><title>Clocks</title><script>var hidden = 'secretword'</script></head>"
        b"<body><p>The astronomical clock of Prague was installed in 1410.</p></body></html>",
    ),
    "pdf": ("whale.pdf", "application/pdf", make_pdf("The heart of a blue whale weighs about as much as a small car.")),
}
QUESTIONS = {
    "text": "Who polishes the lens at Skagen?",
    "markdown": "How often does Stromboli erupt?",
    "html": "When was the astronomical clock of Prague installed?",
    "pdf": "How heavy is the heart of a blue whale?",
}
WORDS = {
    "text": "Skagen lighthouse",
    "markdown": "Stromboli erupts",
    "html": "astronomical Prague",
    "pdf": "blue whale",
}


@pytest.mark.parametrize("kind", KINDS)
def test_file_is_indexed_found_and_removed(system, kind):
    name, content_type, content = KINDS[kind]
    answer = system.http().post(
        "/documents", files={"file": (name, content, content_type)}, data={"external_id": f"e2e/{name}"}
    )
    assert answer.status_code == 202, answer.text
    document_id = answer.json()["document_id"]
    job = system.finish_job(answer.json()["job_id"])
    assert job["object"] == "job" and job["progress"]["done"] == job["progress"]["total"] > 0
    assert system.http().get(f"/documents/{document_id}").json()["num_chunks"] == 1

    # Words of the document alone: Milvus Lite weighs terms by segment, so that common words of a fresh document count
    # as much as its rare ones.
    for mode, query in (("dense", QUESTIONS[kind]), ("keyword", WORDS[kind]), ("hybrid", WORDS[kind])):
        best = system.search(query, mode=mode, top_k=3)[0]
        assert best["document_id"] == document_id, mode
        assert best["external_id"] == f"e2e/{name}"
        assert "secretword" not in best["text"]

    assert system.http().delete(f"/documents/{document_id}").status_code == 200
    assert system.http().get(f"/documents/{document_id}").status_code == 404
    assert document_id not in {hit["document_id"] for hit in system.search(QUESTIONS[kind], top_k=10)}


def test_lines_of_a_jsonl_file_become_documents(system):
    lines = [
        {"_id": f"line-{number}", "title": f"Planet {number}", "text": f"Planet number {number} has {number} moons."}
        for number in range(5)
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    answer = system.http().post(
        "/documents",
        files={"file": ("planets.jsonl", body, "application/jsonl")},
        data={"collection": "planets"},
    )
    assert answer.status_code == 202, answer.text
    system.finish_job(answer.json()["job_id"])
    hits = system.search("moons of planets", collection="planets", top_k=20)
    assert sorted(hit["external_id"] for hit in hits) == [line["_id"] for line in lines]


def test_same_external_id_replaces_the_document(system):
    for version in ("first", "second"):
        accepted = system.add_text(
            f"The {version} edition of the glacier report.", external_id="e2e/glacier", collection="glaciers"
        )
        system.finish_job(accepted["job_id"])
    hits = system.search("glacier report", collection="glaciers", top_k=10)
    assert [hit["text"] for hit in hits] == ["The second edition of the glacier report."]


def test_long_text_becomes_chunks_that_the_encoder_reads_wholly(system):
    sentences = " ".join(f"Sentence number {number} tells of a mountain hut." for number in range(200))
    accepted = system.add_text(sentences + " The last word is edelweiss.", collection="huts")
    system.finish_job(accepted["job_id"])
    assert system.http().get(f"/documents/{accepted['document_id']}").json()["num_chunks"] > 5
    best = system.search("edelweiss", collection="huts", mode="keyword", top_k=1)[0]
    assert "edelweiss" in best["text"]
    with_many = system.search("mountain hut", collection="huts", top_k=10, group_by="document")
    assert len(with_many) == 1


def test_documents_are_listed(system):
    accepted = system.add_text("A text to be listed.", external_id="e2e/listed", collection="listed")
    system.finish_job(accepted["job_id"])
    listed = system.http().get("/documents", params={"collection": "listed"}).json()["data"]
    assert [row["external_id"] for row in listed] == ["e2e/listed"]


def test_file_that_is_not_what_it_claims_is_refused_or_fails_with_a_reason(system):
    answer = system.http().post("/documents", files={"file": ("fake.pdf", b"this is no pdf at all", "application/pdf")})
    assert answer.status_code in (400, 415), answer.text
    assert answer.json()["error"]["param"] == "file"
    torn = make_pdf("torn")[:300]
    answer = system.http().post("/documents", files={"file": ("torn.pdf", torn, "application/pdf")})
    if answer.status_code == 202:
        job = system.finish_job(answer.json()["job_id"], status="failed")
        assert job["error"]
    else:
        assert answer.status_code == 400
