"""How long steps take, learned from the steps themselves, and how many prompt tokens one may carry because of it.

The rule: while a long prompt is read, a step with a piece of it takes at most `max_slowdown` times as long as the
decoding of the others alone. The time of a step is taken as that of its decoding rows plus so much for each prompt
token; both are exponential averages, the first one for each order of magnitude (in base 2) of rows. Nothing is
assumed of the machine, and before anything is known nothing is held back.
"""

from generator.core.steps import StepReport

_WEIGHT = 0.1  # of the newest step in an average
_MAX_RISE = 2.0  # a step in which the machine was away for a second does not count as that
_LEAST_TOKENS = 8  # a prompt goes on, whatever was learned: fewer would cost nearly as much and help nobody
_FULL_PIECE = 16  # a smaller step without decodes says more of a step's fixed cost than of its tokens
_LEAST_TOKEN_S = 1e-7


class StepPacer:
    """Learns from reports; answers the scheduler. Not thread-safe: the engine's thread alone uses it."""

    def __init__(self, max_slowdown: float) -> None:
        self._max_slowdown = max_slowdown
        self._decode_s: dict[int, float] = {}  # by the number of bits of the number of rows
        self._token_s: float | None = None

    def note(self, report: StepReport) -> None:
        """Learns from a step that was computed."""
        rows, num_prefill = report.num_decodes + report.num_drafts, report.num_prefill_tokens
        took_s = report.schedule_s + report.execute_s
        if not num_prefill:
            size = rows.bit_length()
            self._decode_s[size] = _average(self._decode_s.get(size), took_s)
        elif rows:
            alone_s = self._decoding_s(rows)
            if alone_s is not None:
                self._token_s = _average(self._token_s, max(took_s - alone_s, 0.0) / num_prefill)
        elif num_prefill >= _FULL_PIECE:
            self._token_s = _average(self._token_s, took_s / num_prefill)

    def prompt_tokens(self, num_decoding: int, num_prompts: int) -> int | None:
        """Returns how many tokens of long prompts may go beside so many decoding rows; None for any number.

        `num_prompts` are being read or wait to be. Each but the first lets the streams wait for longer: two weigh as
        much as all streams where there are four, or a busy engine would spend half its time on the few that decode.
        """
        alone_s = self._decoding_s(num_decoding)
        if alone_s is None or self._token_s is None:
            return None
        weight = 1 + 2 * max(0, num_prompts - 1) / num_decoding
        extra_s = (self._max_slowdown - 1) * weight * alone_s
        return max(_LEAST_TOKENS, int(extra_s / max(self._token_s, _LEAST_TOKEN_S)))

    def slowdown(self, num_rows: int, num_more: int) -> float | None:
        """Returns how many times longer a step takes with some rows more; None where one of the two is not known."""
        before_s = self._decode_s.get(num_rows.bit_length())
        after_s = self._decode_s.get((num_rows + num_more).bit_length())
        return after_s / before_s if before_s and after_s else None

    def _decoding_s(self, num_rows: int) -> float | None:
        """The time of the nearest size that was seen."""
        size = num_rows.bit_length()
        nearest = min(self._decode_s, key=lambda seen: abs(seen - size), default=None)
        return None if nearest is None else self._decode_s[nearest]


def _average(average: float | None, value: float) -> float:
    if average is None:
        return value
    return average + _WEIGHT * (min(value, _MAX_RISE * average) - average)
