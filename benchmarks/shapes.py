"""The tensors of real models, by shape alone: what a benchmark of kernels runs over."""

Shapes = list[tuple[int, ...]]


def encoder(layers: int, width: int, vocabulary: int, positions: int) -> Shapes:
    """Return the shapes of a BERT-like encoder with a feed-forward width of four times its own."""
    norm: Shapes = [(width,), (width,)]
    square, up, down = (width, width), (4 * width, width), (width, 4 * width)
    attention: Shapes = [square, (width,)] * 4
    layer: Shapes = [*attention, *norm, up, (4 * width,), down, (width,), *norm]
    return [(vocabulary, width), (positions, width), (2, width), *norm, *layer * layers]


def minilm() -> Shapes:
    """all-MiniLM-L6-v2: 22.6 million weights in 101 tensors."""
    return encoder(layers=6, width=384, vocabulary=30522, positions=512)


def large() -> Shapes:
    """A GPT-2-like stack of 12 layers of width 1,024: 203 million weights in 197 tensors."""
    return encoder(layers=12, width=1024, vocabulary=50257, positions=1024)


def count(shapes: Shapes) -> int:
    """Return the number of weights."""
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total
