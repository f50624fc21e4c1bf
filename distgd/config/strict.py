"""What every section of the config is made of: strict types, frozen, unknown keys refused in words."""

from __future__ import annotations

from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
ImportPath = Annotated[
    str, Field(pattern=r"^[^:\s]+:[^:\s]+$", json_schema_extra={"expected": "text of the form module:name"})
]


class Section(BaseModel):
    """Keys with types; true is no number, "4" is no integer, infinity and NaN are refused."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Open(Section):
    """A section whose unknown keys belong to somebody else."""

    model_config = ConfigDict(extra="allow")

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys that this section does not know itself."""
        return dict(self.model_extra or {})


def refuse(key: str, expected: str, found: object, do: str) -> NoReturn:
    """Refuse from within a validator, in the words of `BadInput.at`; without a key it is that of the section."""
    raise PydanticCustomError("refused", "refused", {"key": key, "expected": expected, "found": found, "do": do})
