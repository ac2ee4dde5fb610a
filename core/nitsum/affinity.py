"""Which groups ran prompts that begin alike, so that the next one may find its KV. Pure and bounded: one for each router, so for each pool.

It is a hint for `routing.decide` and promises nothing: engines find KV by their own hashes, and a wrong hint costs a prefill that was due
anyway. A prompt is cut into blocks; the digest of a block covers the cache salt and all tokens up to its end, for KV is shared from the
start on and only under one salt. Digests are keyed, so that nobody can make two prompts collide. A client that sends another's prompt can
still draw the next of these to its own group, or wash out what is kept; neither costs more than `routing.GAP` allows.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from nitsum.routing import Key, Warm

BLOCK = 256
"""Tokens. Shorter prompts are cheap to prefill: nothing is kept of them."""
PROMPT_BLOCKS_MAX = 64
"""Of one prompt; what is behind them is not looked at."""
BLOCKS_MAX = 32_768
"""Kept in all, 8 million tokens; about 8 MB."""
PLACES_MAX = 4
"""Groups kept for a block, so that a prefix that all share does not draw all to one."""
WARM_MAX = 4


class Affinity:
    """Least recently used blocks go first. Groups need not be forgotten: routes know which there are, epochs which still hold their KV.
    `key`: at most 64 bytes that clients do not know."""

    def __init__(self, key: bytes, blocks_max: int = BLOCKS_MAX) -> None:
        self.key, self.blocks_max = key, blocks_max
        self._places: OrderedDict[bytes, tuple[tuple[Key, int], ...]] = OrderedDict()
        """By digest: (group, epoch), the last first."""

    def __len__(self) -> int:
        return len(self._places)

    def digests(self, ids: Sequence[int], salt: str) -> tuple[bytes, ...]:
        """One for each whole block of a prompt, up to PROMPT_BLOCKS_MAX. Raises TypeError, OverflowError for what are no tokens."""
        ids = ids[: BLOCK * PROMPT_BLOCKS_MAX]
        data = memoryview(ids if isinstance(ids, array) and ids.typecode == "q" else array("q", ids)).cast("B")
        size = BLOCK * 8
        salted = salt.encode(errors="surrogatepass")
        so_far = blake2b(len(salted).to_bytes(8, "big") + salted, digest_size=8, key=self.key)
        made = []
        for end in range(size, len(data) + 1, size):
            so_far.update(data[end - size : end])
            made.append(so_far.copy().digest())
        return tuple(made)

    def ran(self, blocks: tuple[bytes, ...], group: Key, epoch: int) -> None:
        """A prompt's blocks went there."""
        place = group, epoch
        was: tuple[tuple[Key, int], ...] = ()
        now: tuple[tuple[Key, int], ...] = (place,)
        for digest in reversed(blocks):  # the ends of prompts, which fewer share, are forgotten before their beginnings
            known = self._places.get(digest, ())
            if known is not was:  # mostly it is that of the block before
                was, now = known, (place, *[p for p in known if p[0] != group][: PLACES_MAX - 1])
            self._places[digest] = now
            self._places.move_to_end(digest)
        while len(self._places) > self.blocks_max:
            self._places.popitem(last=False)

    def warm(self, blocks: tuple[bytes, ...], tokens: int) -> tuple[Warm, ...]:
        """Where the beginning of a prompt of so many tokens ran: the longest first, of one length the last first; at most WARM_MAX."""
        found: dict[tuple[Key, int], Warm] = {}
        for i in range(len(blocks), 0, -1):
            for place in self._places.get(blocks[i - 1], ()):
                if place not in found:
                    found[place] = Warm(*place, i * BLOCK / tokens)
                    if len(found) == WARM_MAX:
                        return tuple(found.values())
        return tuple(found.values())
