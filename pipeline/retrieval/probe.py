"""The linear probe: what can be told from the features by a linear classifier, and that classifier, to keep.

labelled rows ─ split ─┬─ test (20%, or what a column marks): every number that is reported
                       └─ rest ─ split ─┬─ validation (20%): chooses C and the k of k-NN
                                        └─ training
the temperature is found on the validation rows, with a head of the training rows that is as little shrunken as the one
that is saved; that one gets it, and is trained on all but the test rows
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.addresses import join
from pipeline.retrieval.arrays import Floats, Ints, Preparation, Progress
from pipeline.retrieval.head import HeadRecord, save_head
from pipeline.retrieval.labels import Labelled, check_shots, shots, split
from pipeline.retrieval.logistic import Linear, TrainingSet, fit_logistic
from pipeline.retrieval.matrix import Matrix
from pipeline.retrieval.nearest import top_k
from pipeline.retrieval.output import check_name, replacing, write_json
from pipeline.retrieval.plots import confusion
from pipeline.retrieval.scores import Judgement, Scores, judge, score
from pipeline.retrieval.sides import Sides
from pipeline.retrieval.store import FeatureStore
from pipeline.storage import put_bytes
from schemas.errors import SpecError

STRENGTHS = tuple(float(value) for value in 10.0 ** np.arange(-5, 2.1, 1))
NEIGHBOURS = (1, 5, 10, 20)
TEST_SHARE = 0.2
_CHOOSING_ROWS = 50_000
_KNN_ROWS = 2_000
_TEMPERATURE = 0.07
_QUERY_ROWS = 1_000


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found. `few_shot` maps shots to (mean, standard deviation) of the accuracy over the seeds."""

    head: Linear
    strength: float
    validation: dict[float, float]
    test: Scores
    knn: Scores
    knn_k: int
    few_shot: dict[int, tuple[float, float]]
    training_rows: int


def run_probe(
    matrix: Matrix,
    labelled: Labelled,
    *,
    sides: Sides | None = None,
    few: tuple[int, ...] = (),
    seeds: int = 5,
    seed: int = 0,
    progress: Progress,
) -> ProbeResult:
    """Train and judge. `few` are numbers of examples a class, each tried with `seeds` random choices of them.

    `sides` say which of `labelled` to learn from and which to test on; without them a fifth is drawn. Few-shot
    classifiers use the C that was chosen with all labels. Raises SpecError if a class has too few examples.
    """
    rng = np.random.default_rng(seed)
    rest, test = split(labelled, TEST_SHARE, rng) if sides is None else (sides.rest, sides.test)
    check_shots(rest, max(few, default=0))
    training, validation = _halve(rest, rng)
    held = _some(validation, _CHOOSING_ROWS, rng)
    strength, start, tried = _choose_strength(matrix, _some(training, _CHOOSING_ROWS, rng), held, progress)
    # At one C a head is shrunken the less the more rows it is trained on: the penalty on the mean loss is 1 / (C n). So
    # the temperature is found on one that saw all training rows, and is as little shrunken as the one that is saved.
    start = fit_logistic(TrainingSet(matrix, training), strength * len(rest.codes) / len(training.codes), start)
    sharpness = _sharpness(matrix, start, held)
    head = fit_logistic(TrainingSet(matrix, rest), strength, start).sharpened(sharpness)
    progress("training", 1, 1)
    knn_k = _choose_k(matrix, training, _some(validation, _KNN_ROWS, rng))
    knn_test = _some(test, _KNN_ROWS, rng)
    knn = score(knn_probabilities(matrix, rest, knn_test, (knn_k,))[knn_k], knn_test.codes)
    few_shot = {}
    for number, count in enumerate(few):
        few_shot[count] = _few_shot(matrix, rest, test, count, strength, seeds, rng)
        progress("few-shot", number + 1, len(few))
    linear = evaluate(matrix, head, test).scores(len(labelled.classes))
    return ProbeResult(head, strength, tried, linear, knn, knn_k, few_shot, len(rest.codes))


def _halve(rest: Labelled, rng: np.random.Generator) -> tuple[Labelled, Labelled]:
    """Training and validation rows. With one example a class there is nothing to validate with but the same rows."""
    try:
        return split(rest, TEST_SHARE, rng)
    except SpecError:
        return rest, rest


def _some(labelled: Labelled, count: int, rng: np.random.Generator) -> Labelled:
    if len(labelled.codes) <= count:
        return labelled
    return labelled.take(np.sort(rng.choice(len(labelled.codes), count, replace=False)))


def _choose_strength(
    matrix: Matrix, training: Labelled, held: Labelled, progress: Progress
) -> tuple[float, Linear, dict[float, float]]:
    """C of the best accuracy on `held`, of equals of the lowest log loss; its head; all accuracies.

    Each start is the solution before.
    """
    data = TrainingSet(matrix, training)
    tried: dict[float, tuple[float, float]] = {}
    heads: dict[float, Linear] = {}
    linear: Linear | None = None
    for number, strength in enumerate(STRENGTHS):
        linear = fit_logistic(data, strength, linear)
        judged = evaluate(matrix, linear, held)
        heads[strength], tried[strength] = linear, (judged.accuracy, -judged.log_loss)
        progress("choosing C", number + 1, len(STRENGTHS))
    best = max(tried, key=lambda strength: tried[strength])
    accuracies = {strength: accuracy for strength, (accuracy, _) in tried.items()}
    return best, heads[best], accuracies


def _sharpness(matrix: Matrix, head: Linear, held: Labelled) -> float:
    """What to multiply the logits by for the lowest log loss (temperature scaling, Guo et al. 2017).

    A strongly regularised classifier can rank classes well and yet say next to nothing with its probabilities; this
    mends it without changing any prediction. Where every row is labelled right the loss would fall for ever. So of n
    rows each has its label with a probability of (n + 1) / (n + 2), as with Platt (Probabilistic outputs for support
    vector machines, 1999, section 2.2), and any of the others with an equal share of the rest.
    """
    from scipy.optimize import minimize_scalar

    data = TrainingSet(matrix, held)
    doubt = np.float32(1 / (len(data) + 2))

    def losses(vectors: Floats, codes: Ints, factor: np.float32) -> Floats:
        scaled = head.logits(vectors)
        scaled *= factor
        scaled -= scaled.max(axis=1, keepdims=True)
        truth = scaled[np.arange(len(codes)), codes]
        others = (scaled.sum(axis=1) - truth) / np.float32(data.classes - 1)
        expected = truth + doubt * (others - truth)
        found: Floats = np.log(np.exp(scaled, out=scaled).sum(axis=1)) - expected
        return found

    def loss(log_sharpness: float) -> float:
        # The logits of all rows may be far larger than their vectors, so they are made anew each time.
        factor = np.float32(np.exp(log_sharpness))
        return float(np.mean(np.concatenate([losses(vectors, codes, factor) for vectors, codes in data.chunks()])))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 6), method="bounded").x))


def evaluate(matrix: Matrix, head: Linear, labelled: Labelled) -> Judgement:
    """How a head does on labelled rows, in memory that does not grow with rows times classes."""

    def judged() -> Iterator[tuple[Floats, Ints]]:
        done = 0
        for at, vectors in matrix.chunks(labelled.positions, matrix.chunk_rows_for(len(head.bias)), release=True):
            yield head.probabilities(vectors), labelled.codes[done : done + len(at)]
            done += len(at)

    return judge(judged())


def knn_probabilities(matrix: Matrix, training: Labelled, asked: Labelled, ks: tuple[int, ...]) -> dict[int, Floats]:
    """Votes (n, C) of the k nearest training rows for each k, weighted by exp(cosine / 0.07), as in DINO."""
    prepare = Preparation()
    votes = {k: np.zeros((len(asked.codes), len(training.classes)), np.float32) for k in ks}
    for start in range(0, len(asked.codes), _QUERY_ROWS):
        queries = prepare.apply(matrix.take(asked.positions[start : start + _QUERY_ROWS]))
        scores, positions = top_k(matrix, queries, max(ks), positions=training.positions, release=True)
        codes = training.codes[np.searchsorted(training.positions, positions)]
        weights = np.exp((scores - scores[:, :1]) / _TEMPERATURE)
        rows = np.arange(start, start + len(queries))[:, None]
        for k, counted in votes.items():
            np.add.at(counted, (rows, codes[:, :k]), weights[:, :k])
    return {k: counted / counted.sum(axis=1, keepdims=True) for k, counted in votes.items()}


def _choose_k(matrix: Matrix, training: Labelled, validation: Labelled) -> int:
    found = knn_probabilities(matrix, training, validation, NEIGHBOURS)
    accuracy = {k: judge([(probabilities, validation.codes)]).accuracy for k, probabilities in found.items()}
    return max(accuracy, key=lambda k: (accuracy[k], -k))


def _few_shot(
    matrix: Matrix, rest: Labelled, test: Labelled, count: int, strength: float, seeds: int, rng: np.random.Generator
) -> tuple[float, float]:
    found = []
    for _ in range(seeds):
        head = fit_logistic(TrainingSet(matrix, shots(rest, count, rng)), strength)
        found.append(evaluate(matrix, head, test).accuracy)
    return float(np.mean(found)), float(np.std(found))


def describe(result: ProbeResult, labelled: Labelled) -> dict[str, Any]:
    """What `probe --json` prints and `probe.json` keeps."""
    tested, frequent = result.test.confusion.sum(axis=1), np.bincount(labelled.codes).argmax()
    return {
        "classes": len(labelled.classes),
        "labelled_rows": len(labelled.codes),
        "training_rows": result.training_rows,
        "C": result.strength,
        "validation_accuracy": {f"{strength:g}": accuracy for strength, accuracy in result.validation.items()},
        "linear": result.test.describe(labelled.classes),
        "knn": {"k": result.knn_k, **result.knn.describe(labelled.classes)},
        "few_shot": {
            str(count): {"mean": mean, "std": deviation} for count, (mean, deviation) in result.few_shot.items()
        },
        "majority_accuracy": float(tested[frequent] / tested.sum()),
    }


def save_probe(store: FeatureStore, result: ProbeResult, labelled: Labelled, summary: dict[str, Any]) -> None:
    """Write `probes/NAME/`: the head, the confusion of the test rows as a chart, and `summary` as `probe.json`.

    `summary` says at least `name`, `feature`, `labels_from` and `seed`. Raises SpecError for a name that is none.
    """
    name = check_name(summary["name"])
    record = HeadRecord(
        name=name,
        feature=summary["feature"],
        dim=store.check_feature(summary["feature"]),
        labels=labelled.classes,
        model=store.record.model,
        run_id=store.record.run_id,
        label_source=summary["labels_from"],
        strength=result.strength,
        seed=summary["seed"],
        training_rows=result.training_rows,
        accuracy=result.test.accuracy,
    )
    chart = confusion(
        result.test.confusion, labelled.classes, "Confusion on the test rows: true down, predicted across"
    )
    with replacing(store.fs, join(store.root, "probes"), name) as home:
        folder = join(home, name)
        save_head(store, folder, result.head, record)
        put_bytes(store.fs, f"{folder}/confusion.svg", chart.encode())
        write_json(store.fs, f"{folder}/probe.json", summary)
