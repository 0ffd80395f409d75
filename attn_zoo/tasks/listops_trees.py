"""Random list expressions, thousands at a time: a forest as arrays, one level of depth after the other.

The rules are those of Long Range Arena's generator (lra_benchmarks/data/listops.py), a recursion that draws one tree at a time.
"""

import dataclasses

import numpy as np

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")  # minimum, maximum, median (truncated), sum modulo 10
VOCABULARY = ("[PAD]", "[CLS]", *"0123456789", *OPERATORS, "]")
PAD, CLS, DIGIT, OPERATOR, CLOSE = (VOCABULARY.index(token) for token in ("[PAD]", "[CLS]", "0", "[MIN", "]"))

MAX_DEPTH = 10  # where all nodes are digits; the root is at 1
MAX_ARGUMENTS = 10
OPERATOR_PROBABILITY = 0.25


@dataclasses.dataclass
class Level:
    """The nodes of one depth, those of one parent side by side, in the order of their parents."""

    token: np.ndarray  # of a digit, or of an operator's opening
    is_operator: np.ndarray
    arity: np.ndarray  # of each operator, in order

    @property
    def starts(self) -> np.ndarray:
        """Where each operator's arguments start in the level below."""
        return self.arity.cumsum() - self.arity


def generate(min_length: int, max_length: int, seed: int):
    """Yields (tokens uint8, value) of expressions with min_length < tokens < max_length, without end.

    RandomState, because NumPy has frozen its streams and so these data; the streams of its successor may change (NEP 19).
    """
    rng = np.random.RandomState(seed)
    while True:
        levels = draw_forest(rng, 1024, max_length)
        lengths, values = measure(levels), evaluate(levels)
        tokens = np.split(write(levels, lengths), lengths[0].cumsum()[:-1])
        for i in np.flatnonzero((lengths[0] > min_length) & (lengths[0] < max_length)):
            yield tokens[i], int(values[i])


def draw_forest(rng: np.random.RandomState, n: int, max_length: int) -> list[Level]:
    """n trees from the root down. All roots are operators: a tree that is one digit has no length worth keeping.

    A tree that has reached max_length grows no more: it will be thrown away.
    """
    levels, tree, length = [], np.arange(n), np.zeros(n, np.int64)
    is_operator = np.ones(n, bool)
    for depth in range(1, MAX_DEPTH + 1):
        nodes = len(is_operator)
        token = np.where(is_operator, OPERATOR + rng.randint(4, size=nodes), DIGIT + rng.randint(10, size=nodes))
        arity = rng.randint(2, MAX_ARGUMENTS + 1, size=np.count_nonzero(is_operator))
        levels.append(Level(token, is_operator, arity))
        if not len(arity):
            break
        length += np.bincount(tree, minlength=n) + np.bincount(tree[is_operator], minlength=n)  # an operator closes, too
        tree = np.repeat(tree[is_operator], arity)
        is_operator = (rng.random_sample(len(tree)) < OPERATOR_PROBABILITY) & (length < max_length)[tree] & (depth + 1 < MAX_DEPTH)
    return levels


def measure(levels: list[Level]) -> list[np.ndarray]:
    """The number of tokens under each node, a level at a time: 1 for a digit, 2 and its arguments for an operator."""
    lengths = []
    for level in reversed(levels):
        length = np.ones(len(level.token), np.int64)
        if len(level.arity):
            length[level.is_operator] = 2 + np.add.reduceat(lengths[-1], level.starts)
        lengths.append(length)
    return lengths[::-1]


def evaluate(levels: list[Level]) -> np.ndarray:
    """The value of each tree, from the leaves up."""
    below = np.empty(0, np.int64)
    for level in reversed(levels):
        value = level.token - DIGIT
        if len(level.arity):
            starts, arity = level.starts, level.arity
            ordered = below[np.lexsort((below, np.repeat(np.arange(len(arity)), arity)))]  # each operator's arguments, by size
            median = (ordered[starts + (arity - 1) // 2] + ordered[starts + arity // 2]) // 2
            results = (ordered[starts], ordered[starts + arity - 1], median, np.add.reduceat(below, starts) % 10)
            value[level.is_operator] = np.choose(level.token[level.is_operator] - OPERATOR, results)
        below = value
    return below


def write(levels: list[Level], lengths: list[np.ndarray]) -> np.ndarray:
    """The tokens of all trees, one after the other, uint8: each node's place follows from its parent's and its elder siblings'."""
    tokens = np.empty(lengths[0].sum(), np.uint8)
    place = lengths[0].cumsum() - lengths[0]
    for depth, level in enumerate(levels):
        tokens[place] = level.token
        if len(level.arity):
            opening = place[level.is_operator]
            tokens[opening + lengths[depth][level.is_operator] - 1] = CLOSE
            elder = lengths[depth + 1].cumsum() - lengths[depth + 1]
            place = elder + np.repeat(opening + 1 - elder[level.starts], level.arity)
    return tokens
