"""Names of classes: in the order of the logits, as many as there are, and never in the devkit's order."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.testdata import TESTDATA, needs_testdata, trained_vit

from pipeline.models import inspect_model
from pipeline.models.labels import config_labels, read_label_file
from pipeline.small_files import MOST_BYTES
from schemas.errors import CheckpointError, SpecError

NAMES = ["tench, Tinca tinca", "goldfish", "great white shark"]
# The first classes of the challenge's development kit, in its order.
DEVKIT = ["kit fox, Vulpes macrotis", "English setter", "Siberian husky", "Australian terrier", "English springer"]

Write = Callable[[str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(content: str | bytes) -> str:
        path = tmp_path / "labels"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return put


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(NAMES),
        "\ufeff" + "\r\n".join(NAMES) + "\r\n\r\n",
        json.dumps(NAMES),
        json.dumps(dict(enumerate(NAMES))),
        json.dumps({str(index): NAMES[index] for index in (2, 0, 1)}),
        json.dumps({"model_type": "vit", "id2label": dict(enumerate(NAMES))}, indent=2),
    ],
)
def test_forms(content: str, write: Write) -> None:
    found = read_label_file(write(content), 3, {})
    assert found.names == tuple(NAMES)
    assert found.digest == hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb", "2 labels, but the model has 3 classes"),
        ("a\nb\nc\nd", "4 labels, but the model has 3 classes"),
        ("", "0 labels, but the model has 3 classes"),
        ("a\n\nc", "line 2 is empty"),
        ('{"0": "a", "1": "b"', "begins like JSON, but is not"),
        ('{"1": "a", "2": "b", "3": "c"}', "counts classes from 1"),
        ('{"0": "a", "1": "b", "3": "c"}', "the keys are not 0 to 2"),
        ('{"0": "a", "00": "b", "1": "c"}', "the keys are not 0 to 2"),
        ('{"tench": 0, "goldfish": 1}', "the keys of id2label are class numbers; found 'tench'"),
        ('{"0": ["n01440764", "tench"], "1": "b", "2": "c"}', "is no label; expected text"),
        ("[" * 100_000, "begins like JSON, but is not"),
        (b"\xff\xfe\x00\x00", "not UTF-8"),
    ],
)
def test_refused(content: str | bytes, message: str, write: Write) -> None:
    with pytest.raises(SpecError, match="--label-file") as refused:
        read_label_file(write(content), 3, {})
    assert message in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_label_file(str(tmp_path / "none.txt"), 3, {})


def test_a_pipe(pipe: Callable[[bytes], str]) -> None:
    found = read_label_file(pipe(b"a\nb\nc\n"), 3, {})
    assert found.names == ("a", "b", "c")
    assert found.digest == hashlib.sha256(b"a\nb\nc\n").hexdigest()


def test_a_file_that_is_far_too_large(tmp_path: Path) -> None:
    with (tmp_path / "images.tar").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(SpecError, match=r"cannot be read \(more than 64 MiB\); give a list of labels"):
        read_label_file(str(tmp_path / "images.tar"), 3, {})


@pytest.mark.parametrize("first", ["kit fox, Vulpes macrotis", "n02119789", "n02119789 kit fox", "Kit fox"])
def test_the_order_of_the_development_kit_is_refused(first: str, write: Write) -> None:
    names = [first, *DEVKIT[1:], *(f"class {i}" for i in range(995))]
    with pytest.raises(SpecError, match=r"development kit \(1 = kit fox\).*278 = n02119789"):
        read_label_file(write("\n".join(names)), 1000, {})
    # Another set of classes may begin as it likes, and the right order holds the kit fox elsewhere.
    assert read_label_file(write("\n".join(names[:7])), 7, {}).names[0] == first
    right = ["tench", *names[1:278], first, *names[279:]]
    assert read_label_file(write("\n".join(right)), 1000, {}).names[278] == first


def test_a_background_class_in_front_is_named(write: Write) -> None:
    with pytest.raises(SpecError, match="1,001 labels, but the model has 1,000 classes; take out the first"):
        read_label_file(write("\n".join(["background", *map(str, range(1000))])), 1000, {})


def test_of_google_s_21843_classes_beit_has_21841(write: Write) -> None:
    names = [f"c{i}" for i in range(21_843)]
    whole = read_label_file(write("\n".join(names)), 21_843, {}).names
    assert whole == tuple(names)
    beit = read_label_file(write("\n".join(names)), 21_841, {}).names
    assert len(beit) == 21_841
    assert (beit[9204], beit[9205], beit[15_025], beit[15_026]) == ("c9204", "c9206", "c15026", "c15028")
    assert not {"c9205", "c15027"} & set(beit)
    # The same from a config: with all names, with gaps where the two were, and numbered anew.
    for kept in (names, [n for n in names if n not in ("c9205", "c15027")]):
        config = {"id2label": {name[1:]: name for name in kept}}
        assert config_labels(config, 21_841, "here") == beit
    assert config_labels({"id2label": {str(i): name for i, name in enumerate(beit)}}, 21_841, "here") == beit


def test_a_config_with_gaps_elsewhere_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the config names 3 classes, but the classifier has 3"):
        config_labels({"id2label": {"0": "a", "1": "b", "3": "c"}}, 3, "here")
    with pytest.raises(CheckpointError, match="does not map class numbers"):
        config_labels({"id2label": {"a": 0}}, 1, "here")


def test_names_of_the_checkpoint_that_this_one_was_trained_from_are_not_its_own() -> None:
    """timm 1.0.15 keeps them beside a classifier of other classes."""
    base = {"pretrained_cfg": {"label_names": [f"name {i}" for i in range(1000)]}}
    assert config_labels(base, 10, "here") == tuple(f"LABEL_{i}" for i in range(10))
    assert config_labels({**base, "id2label": {"0": "a", "1": "b"}}, 2, "here") == ("a", "b")


def test_names_in_timm_s_config(tmp_path: Path) -> None:
    """A list, a map from numbers, and what timm itself writes of a model that it loaded with such names."""
    import timm
    from timm.models._hub import save_for_hf

    sizes = {"embed_dim": 96, "depth": 1, "num_heads": 4}
    model = timm.create_model("vit_base_patch16_224", num_classes=3, **sizes)
    for name, given in (("list", NAMES), ("map", dict(enumerate(NAMES)))):
        save_for_hf(model, str(tmp_path / name), model_args=sizes, model_config={"label_names": given})
        again = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        save_for_hf(again, str(tmp_path / f"{name} again"), model_args=sizes)
        for folder in (name, f"{name} again"):
            assert inspect_model(str(tmp_path / folder)).labels == tuple(NAMES), folder
    assert config_labels({"label_names": {"0": "a", "2": "c"}}, 3, "here") == ("a", "LABEL_1", "c")
    for wrong in (["a", "b"], {"3": "d"}):
        with pytest.raises(CheckpointError, match="but the classifier has 3"):
            config_labels({"label_names": wrong}, 3, "here")


def test_a_checkpoint_takes_names_from_the_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "vit", "vit-classifier")
    plain = inspect_model(str(folder))
    assert (plain.labels[:2], plain.label_digest) == (("LABEL_0", "LABEL_1"), None)
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(37)))
    named = inspect_model(str(folder), label_file=str(tmp_path / "names.txt"))
    assert named.labels[36] == "name 36"
    assert named.label_digest == hashlib.sha256((tmp_path / "names.txt").read_bytes()).hexdigest()
    assert named.digest == plain.digest


@needs_testdata
def test_imagenet_s_own_lists() -> None:
    """The synsets that models count, and the checkpoint's names, agree; so do the 21,843."""
    folder = TESTDATA / "labels"
    synsets = read_label_file(str(folder / "timm_imagenet_synsets.txt"), 1000, {}).names
    assert (synsets[0], synsets[278]) == ("n01440764", "n02119789")
    words = dict(
        line.split("\t") for line in (folder / "timm_imagenet_synset_to_lemma.txt").read_text().splitlines() if line
    )
    names = inspect_model(str(trained_vit())).labels
    agree = [
        bool({w.strip() for w in words[s].split(",")} & {w.strip() for w in n.split(",")})
        for s, n in zip(synsets, names, strict=True)
    ]
    assert sum(agree) > 990
    large = str(folder / "timm_imagenet21k_goog_synsets.txt")
    assert len(read_label_file(large, 21_843, {}).names) == 21_843
    assert len(read_label_file(large, 21_841, {}).names) == 21_841
