"""Values of a spec that have a spelling of their own: `384` or `224x320`, `2:8`, `0/4`. Options and files take both."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from schemas.errors import SpecError


def image_size(value: Any) -> Any:
    """`384`, `"384"`, `"224x320"` (height x width) or a pair → one number for a square, else (height, width).

    Raises ValueError for text of another form; other values are left to the spec's own validation.
    """
    if isinstance(value, str):
        sides = value.lower().replace("×", "x").split("x")
        if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
            raise ValueError("expected pixels as N or HEIGHTxWIDTH, such as 384 or 224x320")
        value = tuple(int(side) for side in sides)
    if isinstance(value, list | tuple) and len(set(value)) == 1 and len(value) <= 2:
        return value[0]
    return value


Side = Annotated[int, Field(ge=1)]
ImageSize = Annotated[Side | tuple[Side, Side], BeforeValidator(image_size)]


class Strict(BaseModel):
    """Immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ActorRange(Strict):
    """How many predictor actors: between `min` and `max`, scaled by Ray Data with the backlog."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="before")
    @classmethod
    def _spelled(cls, value: Any) -> Any:
        """`4`, `"4"` or `"2:8"`, as the option takes it."""
        if isinstance(value, str) or type(value) is int:
            low, _, high = str(value).partition(":")
            if not low.isdecimal() or not (high or low).isdecimal():
                raise ValueError("expected N or MIN:MAX with 1 <= MIN <= MAX")
            return {"min": int(low), "max": int(high or low)}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> "ActorRange":
        if self.max < self.min:
            raise ValueError(f"MAX {self.max} is below MIN {self.min}")
        return self

    @classmethod
    def parse(cls, text: str) -> "ActorRange":
        """`--actors`: `4` or `2:8`. Raises SpecError for what is neither."""
        try:
            return cls.model_validate(text)
        except ValueError as error:
            raise SpecError(f"--actors {text}: expected N or MIN:MAX with 1 <= MIN <= MAX") from error


class Shard(Strict):
    """The `index`-th (from 0) of `count` equal row ranges of the manifest."""

    index: int = Field(ge=0)
    count: int = Field(ge=1)

    @model_validator(mode="before")
    @classmethod
    def _spelled(cls, value: Any) -> Any:
        """`"0/4"`, as the option takes it."""
        if isinstance(value, str):
            index, _, count = value.partition("/")
            if not index.isdecimal() or not count.isdecimal():
                raise ValueError("expected I/N with 0 <= I < N, such as 0/4")
            return {"index": int(index), "count": int(count)}
        return value

    @model_validator(mode="after")
    def _inside(self) -> "Shard":
        if self.index >= self.count:
            raise ValueError(f"shard {self.index} of {self.count}: shards count from 0 to {self.count - 1}")
        return self

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`--shard`: `0/4` … `3/4`. Raises SpecError for anything else."""
        try:
            return cls.model_validate(text)
        except ValueError as error:
            raise SpecError(f"--shard {text}: expected I/N with 0 <= I < N, such as 0/4") from error


WHOLE = Shard(index=0, count=1)


def parse_image_size(text: str | None) -> int | tuple[int, int] | None:
    """`--image-size`. Raises SpecError unless it is N or HEIGHTxWIDTH."""
    try:
        value: int | tuple[int, int] | None = TypeAdapter(ImageSize | None).validate_python(text)
        return value
    except ValidationError:
        raise SpecError(f"--image-size {text}: expected pixels as N or HEIGHTxWIDTH, such as 384 or 224x320") from None
