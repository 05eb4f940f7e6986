"""Planning is arithmetic: figures that were worked out by hand, and relations that hold for any job."""

import math
from dataclasses import replace

import pytest

from pipeline.models.architecture import Architecture, Stem
from pipeline.models.cost import forward_flop
from pipeline.planning import DEVICES, MAX_IMAGES, Costs, Device, Plan, make_plan, row_bytes
from schemas.errors import SpecError

COSTS = Costs(file_bytes=100_000, decode_s=0.003, pixel_bytes=150_528, output_bytes=8_000, model_flop=123e9)
NAMES = {"throughput", "time", "read", "network", "object store", "memory", "output", "parts", "manifest", "shards"}


def vit(width: int, depth: int, heads: int) -> Architecture:
    return Architecture(
        network="vit", width=width, depth=depth, heads=heads, mlp_width=4 * width,
        patch_size=(16, 16), trained_size=(224, 224), epsilon=1e-6,
    )  # fmt: skip


def check(plan: Plan) -> None:
    """What holds for every plan."""
    assert {step.name for step in plan.steps} >= NAMES
    assert all(math.isfinite(step.value) and step.value >= 0 for step in plan.steps)
    assert all(step.arithmetic for step in plan.steps)
    assert len({step.name for step in plan.steps}) == len(plan.steps)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "gmac"), [(768, 12, 12, 17.6), (1024, 24, 16, 61.6), (192, 12, 3, 1.26)]
)
def test_forward_pass_of_published_networks(width: int, depth: int, heads: int, gmac: float) -> None:
    """B/16, L/16 and Ti/16 at 224 pixels, as timm counts them."""
    assert forward_flop(vit(width, depth, heads), (224, 224)) / 2e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize(
    ("units", "patch", "net", "gmac"),
    [
        ((2, 2, 2, 2), 32, (384, 12, 6), 3.56),
        ((3, 4, 6, 3), 32, (1024, 24, 16), 19.6),
        ((), 32, (192, 12, 3), 0.44),
    ],
)
def test_forward_pass_of_published_hybrids(
    units: tuple[int, ...], patch: int, net: tuple[int, int, int], gmac: float
) -> None:
    """R26+S/32, R50+L/32 and R+Ti/16 at 224 pixels, as timm counts them."""
    hybrid = replace(vit(*net), patch_size=(patch, patch), stem=Stem(64, units))
    assert forward_flop(hybrid, (224, 224)) / 2e9 == pytest.approx(gmac, rel=0.03)


def test_forward_pass_of_published_mixer() -> None:
    """Mixer-B/16 at 224 pixels, as timm counts it."""
    mixer = replace(vit(768, 12, 12), network="mixer", class_token=False, token_mlp_width=384)
    assert forward_flop(mixer, (224, 224)) / 2e9 == pytest.approx(12.6, rel=0.01)


def test_a_larger_picture_costs_more_than_its_pixels() -> None:
    base = vit(768, 12, 12)
    ratio = forward_flop(base, (384, 384)) / forward_flop(base, (224, 224))
    assert (384 / 224) ** 2 < ratio < (384 / 224) ** 4


def test_by_hand_on_a_gpu() -> None:
    plan = make_plan(1_000_000, COSTS, Device("X", 246, 0.5), devices=2)
    check(plan)
    assert plan.value("images/s a device") == pytest.approx(1000)
    assert plan.value("CPUs for each device") == pytest.approx(3.0)
    # Six decode; each of the two actors books one.
    assert plan.value("cores") == 8
    assert plan.value("throughput") == pytest.approx(2000)
    assert plan.value("time") == pytest.approx(500 / 3600)
    assert plan.value("read") == 1e11
    assert plan.value("network") == pytest.approx(1.6)
    # 256 images of 150,528 bytes, two batches a block; 2 blocks for each of 6 tasks and 6 for each of 2 actors.
    assert plan.value("object store") == (2 * 6 + 6 * 2) * 2 * 256 * 150_528
    assert plan.value("output") == 8e9
    # 16 MB a second: 64 MiB are full before the half minute is over.
    assert plan.value("parts") == math.ceil(8e9 / 2**26)
    assert plan.value("shards") == 1


@pytest.mark.parametrize(
    ("rate", "part", "why"),
    [(100, 2**28, "256 MiB after compaction"), (200, 48_000_000, "46 MiB as committed"), (300, 2**26, "64 MiB as")],
)
def test_parts_that_the_clock_cuts_small_are_merged(rate: int, part: int, why: str) -> None:
    plan = make_plan(1_000_000, COSTS._replace(predict_s=1 / rate), DEVICES["l4"])
    assert plan.value("throughput") == pytest.approx(rate)
    (step,) = [step for step in plan.steps if step.name == "parts"]
    assert step.value == math.ceil(8e9 / part)
    assert step.arithmetic.startswith(f"output ÷ {why}")


@pytest.mark.parametrize(("tokens", "width", "block_rows"), [(196, 1024, 128), (577, 1024, 32), (1369, 1536, 8)])
def test_blocks_of_patch_features_have_fewer_rows(tokens: int, width: int, block_rows: int) -> None:
    """ViT-L at 224 and 384, DINOv2-giant at 518 pixels: a block has at most 128 MiB, of two batches."""
    row = tokens * width * 4
    assert 2 * block_rows * row > 128 << 20
    plan = make_plan(1_000_000, COSTS._replace(output_bytes=row), DEVICES["h100"], devices=2, cpus=6)
    assert plan.value("object store") == (2 * 4 + 6 * 2) * block_rows * row


def test_too_few_cores_hold_it_up() -> None:
    plan = make_plan(1_000_000, COSTS, Device("X", 246, 0.5), devices=2, cpus=5)
    assert plan.value("throughput") == pytest.approx(1000)
    (step,) = [step for step in plan.steps if step.name == "throughput"]
    assert "decoding holds it up" in step.arithmetic
    assert "2,000" in step.arithmetic
    (cores,) = [step for step in plan.steps if step.name == "cores"]
    assert (cores.value, cores.arithmetic) == (5, "as asked for; 8 keep the devices busy")


def test_on_the_cores_of_actors_nothing_is_decoded() -> None:
    """A T4 and four cores: three decode at 5.2 ms an image. Of two cores with two GPUs, the actors book one."""
    costs = COSTS._replace(decode_s=0.0052, model_flop=35e9)
    plan = make_plan(1_000_000, costs, DEVICES["t4"], cpus=4)
    assert plan.value("images/s a device") == pytest.approx(743, abs=1)
    assert plan.value("throughput") == pytest.approx(3 / 0.0052)
    (step,) = [step for step in plan.steps if step.name == "throughput"]
    assert step.arithmetic.startswith("(4 cores - 1 of actors) ÷ 0.0052 s: decoding holds it up")
    few = make_plan(1_000_000, costs, DEVICES["t4"], devices=2, cpus=2)
    assert few.value("throughput") == pytest.approx(1 / 0.0052)


@pytest.mark.parametrize(("gflop", "told"), [(123, False), (2.5, True)])
def test_a_small_network_is_told_not_to_fill_a_gpu(gflop: float, told: bool) -> None:
    plan = make_plan(1000, COSTS._replace(model_flop=gflop * 1e9), DEVICES["h100"])
    (step,) = [step for step in plan.steps if step.name == "images/s a device"]
    assert ("at most: so small a network does not fill it" in step.arithmetic) == told


def test_cores_share_decoding_and_the_model() -> None:
    plan = make_plan(1000, COSTS._replace(decode_s=0.5), Device("core", 0.246, 1.0, False), devices=4)
    check(plan)
    assert plan.value("images/s a device") == pytest.approx(1.0)
    assert plan.value("throughput") == pytest.approx(4.0)
    assert plan.value("cores") == 4
    # 4 images of 150,528 bytes; 2 blocks for each of 4 tasks and 3 for each of the one actor's 4 calls.
    assert plan.value("object store") == (2 * 4 + 3 * 4) * 4 * 150_528


@pytest.mark.parametrize(("device", "actors"), [("h100", 4), ("cpu", 1)])
def test_actors_have_memory_too(device: str, actors: int) -> None:
    """On GPUs one each; four cores have one."""
    plans = [make_plan(10**6, COSTS._replace(model_bytes=b), DEVICES[device], devices=4) for b in (None, 5 << 30)]
    without, with_model = (plan.value("memory") for plan in plans)
    assert with_model - without == pytest.approx(actors * (5 << 30))
    shown = [step.arithmetic for plan in plans for step in plan.steps if step.name == "memory"]
    assert "without that of the actors, which hold the model" in shown[0]
    assert shown[1].endswith(f" + {actors} actors × 5.00 GiB")


def test_cores_that_are_the_devices_are_counted_once() -> None:
    core = Device("core", 0.246, 1.0, False)
    plan = make_plan(1000, COSTS, core, cpus=16)
    for same in (make_plan(1000, COSTS, core, devices=16), make_plan(1000, COSTS, core, devices=16, cpus=16)):
        assert plan.steps == same.steps
    assert plan.value("devices") == plan.value("cores") == 16
    with pytest.raises(SpecError, match=r"--cpus 16 with --devices: each device is a core here.* give one"):
        make_plan(1000, COSTS, core, devices=4, cpus=16)
    with pytest.raises(SpecError, match=r"--cpus 16 with --hours"):
        make_plan(1000, COSTS, core, hours=2, cpus=16)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("images", [1, 1_000, 40_000_000, MAX_IMAGES])
@pytest.mark.parametrize("hours", [0.5, 24.0, 1000.0])
def test_a_time_is_kept_by_as_few_devices_as_do(device: Device, images: int, hours: float) -> None:
    plan = make_plan(images, COSTS, device, hours=hours)
    check(plan)
    assert plan.value("time") <= hours * (1 + 1e-9)
    needed = int(plan.value("devices"))
    if needed > 1:
        assert make_plan(images, COSTS, device, devices=needed - 1).value("time") > hours


@pytest.mark.parametrize("factor", [2, 10, 1000])
def test_linear_in_the_images(factor: int) -> None:
    one, many = (make_plan(n, COSTS, DEVICES["l4"]) for n in (1_000_000, 1_000_000 * factor))
    for name in ("time", "read", "output", "manifest"):
        assert many.value(name) == pytest.approx(factor * one.value(name))
    for name in ("throughput", "object store", "memory", "network", "cores"):
        assert many.value(name) == one.value(name)


def test_a_billion_images() -> None:
    plan = make_plan(MAX_IMAGES, COSTS, DEVICES["h100"], hours=24)
    check(plan)
    assert plan.value("output") == 8e12
    assert plan.value("shards") == 10


def test_what_was_measured_wins_over_the_estimate() -> None:
    plan = make_plan(1000, COSTS._replace(predict_s=0.01), DEVICES["l4"])
    check(plan)
    assert plan.value("images/s a device") == pytest.approx(100)
    assert plan.value("CPUs for each device") == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("images", "options"),
    [(0, {}), (-5, {}), (MAX_IMAGES + 1, {}), (10, {"devices": 0}), (10, {"hours": 0.0}), (10, {"cpus": 0})],
)
def test_refused(images: int, options: dict[str, float]) -> None:
    with pytest.raises(SpecError):
        make_plan(images, COSTS, DEVICES["l4"], **options)  # type: ignore[arg-type]


def test_bytes_of_a_row() -> None:
    assert row_bytes(8192, labels=5, uri_bytes=100) == 8192 + 50 + 75 + 50
    assert row_bytes(2048, labels=0, uri_bytes=0) == 2048 + 75
