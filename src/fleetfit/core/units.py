"""Sizes and times as people write them."""

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: object) -> object:
    """'300 KB' -> 300000; integers pass. Powers of ten for KB, MB, GB and of two for KiB, MiB, GiB."""
    if isinstance(value, str):
        number = value.strip().rstrip("BKMGIbkmgi ")
        unit = value.strip()[len(number) :].strip().upper() or "B"
        try:
            return int(float(number) * UNITS[unit])
        except (KeyError, ValueError, OverflowError):
            raise ValueError(f"must be bytes, as 300000 or '300 KB' (units {', '.join(UNITS)})") from None
    if isinstance(value, bool):
        raise ValueError("must be bytes, as 300000 or '300 KB'")
    return value


def parse_seconds(value: object) -> object:
    """'50 ms' -> 0.05; numbers pass, as seconds."""
    if isinstance(value, str):
        number, unit = value.strip(), 1.0
        for ending, factor in (("ms", 1e-3), ("s", 1.0)):
            if number.endswith(ending):
                number, unit = number.removesuffix(ending).strip(), factor
                break
        try:
            return float(number) * unit
        except ValueError:
            raise ValueError("must be seconds, as 0.05 or '50 ms'") from None
    if isinstance(value, bool):
        raise ValueError("must be seconds, as 0.05 or '50 ms'")
    return value
