"""From measured costs to bottleneck, rate and advice: arithmetic, the same on every machine."""

from itertools import pairwise

import pytest

from pipeline.advice import (
    Forward,
    Measured,
    Shape,
    advise,
    bottleneck,
    cpus_for_a_gpu,
    doubts,
    ideal_rate,
    stage_costs,
)
from pipeline.rehearsal import steady_rate
from pipeline.sampling import stretches

LAPTOP = Shape(cpus=2, gpus=0, lanes=2, decode="exact")
GPU_BOX = Shape(cpus=8, gpus=1, lanes=1, decode="exact")


def measured(**changes: object) -> Measured:
    """On a laptop: 4 ms to decode, 96 ms to predict on one core, and next to nothing else."""
    values: dict[str, object] = {
        "sampled": 48, "listed": 1000, "failed": 0, "file_bytes": 1e5, "fetch_s": 1e-4, "fetch_core_s": 1e-4,
        "decode_core_s": {"exact": 4e-3, "fast": 2e-3}, "fast_cosines": [0.999] * 10, "transfer_core_s": 1e-4,
        "forward": [Forward("float32", 8, 1, 0.0957, [])], "write_s": 1e-4,
    }  # fmt: skip
    return Measured(**{**values, **changes})  # type: ignore[arg-type]


def on_gpu(image_s: float, **changes: object) -> Measured:
    return measured(forward=[Forward("bfloat16", 256, 0, image_s, [])], **changes)


def test_on_cores_the_stages_add_up() -> None:
    costs = stage_costs(measured(), LAPTOP)
    assert ideal_rate(costs, LAPTOP) == pytest.approx(2 / 0.1)
    assert bottleneck(costs, LAPTOP) == "forward"
    assert [cost.name for cost in costs] == ["fetch", "decode", "transfer", "forward", "write"]
    assert "nothing to change" in advise(measured(), LAPTOP)[0]


def test_a_slow_source_is_named() -> None:
    slow = measured(fetch_s=1.0)
    costs = stage_costs(slow, LAPTOP)
    assert bottleneck(costs, LAPTOP) == "fetch"
    assert ideal_rate(costs, LAPTOP) == pytest.approx(2.0)
    assert "the source is what is waited for (0.1 MB/s" in advise(slow, LAPTOP)[0]


def test_a_gpu_that_starves_is_told_how_many_cores_it_needs() -> None:
    starving = on_gpu(1 / 4000)
    costs = stage_costs(starving, GPU_BOX)
    assert bottleneck(costs, GPU_BOX) == "decode"
    assert ideal_rate(costs, GPU_BOX) == pytest.approx(8 / 4.3e-3)
    assert cpus_for_a_gpu(starving, GPU_BOX) == pytest.approx(4000 * 4.3e-3)
    sentences = advise(starving, GPU_BOX)
    assert "8 CPUs feed 1,860 of the 4,000 images/s they could do; have 17 CPUs" in sentences[0]
    assert any("--decode fast: 1.87 times the images/s" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("cpus", "busy", "told"),
    [
        (
            8,
            {"fetch_core_s": 4e-3, "fetch_s": 4.2e-3},
            "8 CPUs feed 1,290 of the 2,500 images/s they could do; have 16",
        ),
        (
            4,
            {"fetch_core_s": 1e-4, "write_s": 4e-3},
            "4 CPUs feed 645 of the 2,500 images/s they could do; have 16 CPUs",
        ),
    ],
)
def test_cores_that_starve_a_gpu_are_what_is_short_whatever_takes_most_of_them(
    cpus: int, busy: dict[str, float], told: str
) -> None:
    """Nobody waits for a source or for parts whose work the cores have no time for."""
    shape = GPU_BOX._replace(cpus=cpus)
    starving = on_gpu(1 / 2500, decode_core_s={"exact": 2e-3, "fast": 2e-3}, **busy)
    costs = stage_costs(starving, shape)
    assert bottleneck(costs, shape) == max(costs, key=lambda cost: cost.core_s).name != "decode"
    (sentence,) = advise(starving, shape)
    assert told in sentence
    assert "waited for" not in sentence


def test_on_the_cores_of_actors_nothing_is_decoded() -> None:
    """A T4 with ViT-B and four cores: three of them decode."""
    shape = Shape(cpus=4, gpus=1, lanes=1, decode="exact", actor_cpus=1.0)
    starving = on_gpu(1 / 740, decode_core_s={"exact": 5.2e-3, "fast": 5.2e-3}, fetch_s=6e-3)
    fetch, decode, *_ = stage_costs(starving, shape)
    assert decode.alone == pytest.approx(3 / 5.2e-3)
    assert fetch.alone == pytest.approx(3 / 6e-3)
    starving = starving._replace(fetch_s=1e-4)
    assert ideal_rate(stage_costs(starving, shape), shape) == pytest.approx(3 / 5.2e-3)
    assert cpus_for_a_gpu(starving, shape) == pytest.approx(740 * 5.2e-3 + 1)
    assert (
        "4 CPUs, of which the actors have 1, feed 577 of the 740 images/s they could do; have 5 CPUs, 4.8 for"
        in (advise(starving, shape)[0])
    )


def test_a_gpu_with_cores_enough_is_the_bottleneck_itself() -> None:
    fed = on_gpu(1 / 500)
    costs = stage_costs(fed, GPU_BOX)
    assert bottleneck(costs, GPU_BOX) == "forward"
    assert ideal_rate(costs, GPU_BOX) == pytest.approx(500)


def test_a_job_writes_a_few_parts_at_once_whatever_its_cores() -> None:
    """Patch features on 64 cores and 8 GPUs: 3.3 ms to write an image, and five writes under way."""
    shape = Shape(cpus=64, gpus=8, lanes=8, decode="exact")
    heavy = on_gpu(1 / 1000, write_s=3.3e-3)
    costs = stage_costs(heavy, shape)
    assert costs[-1].alone == ideal_rate(costs, shape) == pytest.approx(5 / 3.3e-3)
    assert bottleneck(costs, shape) == "write"
    (sentence,) = advise(heavy, shape)
    assert "1,515 images/s at most" in sentence
    assert "store vectors with --feature-dtype float16 (patches always are)" in sentence
    assert "CPUs" not in sentence


def test_no_more_is_written_at_once_than_there_are_cores() -> None:
    costs = stage_costs(measured(write_s=1.0), LAPTOP)
    assert costs[-1].alone == pytest.approx(2.0)
    assert "writing is what is waited for" in advise(measured(write_s=1.0), LAPTOP)[0]


def test_a_faster_precision_comes_with_its_distance() -> None:
    base = measured().forward[0]
    both = [base, base._replace(dtype="bfloat16", image_s=0.0257, cosines=[0.9999, 0.9990, 0.9998])]
    (sentence,) = advise(measured(forward=both), LAPTOP)
    assert "--dtype bfloat16: 3.33 times the images/s" in sentence
    assert "0.99980 (least 0.99900)" in sentence
    slower = [base, base._replace(dtype="bfloat16", image_s=0.3, cosines=[0.9999])]
    assert "nothing to change" in advise(measured(forward=slower), LAPTOP)[0]


def test_a_precision_that_a_job_would_refuse_is_not_advised() -> None:
    base = measured().forward[0]
    far = [base, base._replace(dtype="int8", image_s=0.02, cosines=[0.94, 0.95, 0.999])]
    assert "nothing to change" in advise(measured(forward=far), LAPTOP)[0]


def test_cores_without_a_thread_of_an_actor_do_not_compute() -> None:
    shape = Shape(cpus=8, gpus=0, lanes=1, decode="exact")
    four = measured(forward=[Forward("float32", 8, 4, 0.0957 / 4, [])])
    costs = stage_costs(four, shape)
    assert ideal_rate(costs, shape) == pytest.approx(4 / 0.0957)
    assert bottleneck(costs, shape) == "forward"


def test_a_better_batch_size_is_named_only_if_it_matters() -> None:
    base = measured().forward[0]
    assert advise(measured(forward=[base, base._replace(batch_size=32, image_s=0.06)]), LAPTOP) == [
        "--batch-size 32: 1.56 times the images/s of 8"
    ]
    assert "nothing" in advise(measured(forward=[base, base._replace(batch_size=32, image_s=0.092)]), LAPTOP)[0]


def test_fast_decoding_that_changes_features_is_advised_against() -> None:
    large = {"decode_core_s": {"exact": 0.2, "fast": 0.08}}
    assert "--decode fast: 1.68 times" in advise(measured(**large), LAPTOP)[0]
    (sentence,) = advise(measured(**large, fast_cosines=[0.99, 0.98, 0.999]), LAPTOP)
    assert "stay exact" in sentence
    assert "0.99000 (least 0.98000)" in sentence


@pytest.mark.parametrize("rows", [1, 47, 48, 49, 100, 1000])
def test_the_sample_lies_in_stretches_over_the_whole(rows: int) -> None:
    chosen = stretches(rows, 48, 8)
    assert len(set(chosen)) == len(chosen) <= 48
    assert chosen[0] == 0
    assert chosen[-1] == rows - 1
    if rows >= 100:
        assert sum(b - a == 1 for a, b in pairwise(chosen)) >= len(chosen) * 7 // 8 - 1


def test_the_rate_leaves_out_start_and_tail() -> None:
    seen = [(9.9, 8), (10.0, 16), (11.0, 26), (12.0, 36), (17.0, 40)]
    assert steady_rate(seen, 16, 36) == pytest.approx(10.0)
    assert steady_rate(seen, 16, 16) == pytest.approx(32 / 7.1)
    assert steady_rate([(1.0, 5)], 0, 5) == 0.0
    assert steady_rate([], 0, 5) == 0.0


def test_more_than_the_ideal_is_doubted() -> None:
    assert doubts(0.5) == doubts(1.05) == []
    assert "139% of what its stages would allow" in doubts(1.39)[0]
