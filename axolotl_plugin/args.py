"""The `commonit_*` keys as Axolotl wants them, both derived from `commonit_trl.config`: a pydantic model that becomes
part of the recipe's schema, and a dataclass that becomes part of the training arguments."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, Field, create_model, model_validator

from commonit_trl.config import OPTIONS, CommonITArguments, check_option_names


def read_options(recipe: Mapping[str, Any]) -> CommonITArguments:
    """The checked options of a recipe.

    Raises:
        ValueError: on a missing metric, an unknown `commonit*` key or a wrong value.
    """
    check_option_names(filter(_is_name, recipe))
    return CommonITArguments(**{name: recipe[name] for name in OPTIONS if recipe.get(name) is not None})


def _is_name(key: Any) -> bool:
    return isinstance(key, str)  # what else a YAML key may be is for Axolotl to judge


class _Checked(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def check_commonit_options(cls, recipe: Any) -> Any:
        if not any(name.startswith("commonit") for name in filter(_is_name, recipe)):
            return recipe  # a later recipe of the same process; one of ours without a metric is refused in `register`
        return {**recipe, **asdict(read_options(recipe))}


_HINTS = get_type_hints(CommonITArguments)
_FIELDS: dict[str, Any] = {
    name: (_HINTS[name], Field(default=option.default, description=option.metadata["help"]))
    for name, option in OPTIONS.items()
}
# Axolotl's schema class inherits from this one by its name.
CommonITArgs = create_model("CommonITArgs", __base__=_Checked, __module__=__name__, **_FIELDS)


@dataclass(kw_only=True)
class CommonITTrainingArgs(CommonITArguments):
    """What Axolotl's training arguments inherit. The class outlives the recipe: a later one of the same process that
    does not name the plugin trains with plain batches."""

    commonit_metric: str | None = "none"
