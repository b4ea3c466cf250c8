"""The `commonit_*` keys for Axolotl, derived from `commonit_trl.config`.

A pydantic model extends the recipe's schema, and a dataclass extends the training arguments.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, Field, create_model, model_validator

from commonit_trl.config import OPTIONS, CommonITArguments, check_option_names


def read_options(recipe: Mapping[str, Any]) -> CommonITArguments:
    """Check and return the options of a recipe.

    Raises:
        ValueError: if the metric is missing, a `commonit*` key is unknown or a value is wrong.
    """
    check_option_names(filter(_is_name, recipe))
    return CommonITArguments(**{name: recipe[name] for name in OPTIONS if recipe.get(name) is not None})


def _is_name(key: Any) -> bool:
    return isinstance(key, str)  # Axolotl rejects keys of other types


class _Checked(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def check_commonit_options(cls, recipe: Any) -> Any:
        if not any(name.startswith("commonit") for name in filter(_is_name, recipe)):
            return recipe  # a later recipe without the plugin; `register` refuses a missing metric
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
    """The options among Axolotl's training arguments.

    The class remains for later recipes of the process, so the default is off for those without the plugin.
    """

    commonit_metric: str | None = "none"
