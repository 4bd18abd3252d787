"""Random numbers are addressed, not consumed: what they are for names the seed they are drawn from."""

import hashlib


def address(*parts: object) -> int:
    """A seed in [0, 2^63): a hash of the parts, the same on every machine.

    Example: `address(recipe.seed, "dropout", step)` seeds the dropout of one step, whatever was drawn before.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
