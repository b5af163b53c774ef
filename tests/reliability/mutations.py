"""Bytes that a broken disk, an interrupted copy or a stranger has changed."""


def damaged(content, rng):
    """Change, cut, repeat, move or add bytes."""
    content = bytearray(content)
    start, stop = sorted(rng.integers(0, len(content) + 1, 2).tolist())
    stop = min(stop, start + 2 ** int(rng.integers(13)))
    match rng.integers(8):
        case 0:
            for place in rng.integers(0, len(content), rng.integers(1, 5)):
                content[place] ^= 1 << int(rng.integers(8))
        case 1:
            for place in rng.integers(0, min(len(content), 4000), rng.integers(1, 5)):
                content[place] = rng.integers(256)
        case 2:
            del content[start:]
        case 3:
            del content[start:stop]
        case 4:
            content[start:start] = content[start:stop]
        case 5:
            content += rng.bytes(int(rng.integers(1, 100)))
        case 6:
            content[start:stop] = bytes(stop - start)
        case 7:
            content[:] = content[:start] + content[stop:] + content[start:stop]
    return bytes(content)
