"""CommonIT for Axolotl: `plugins: [axolotl_plugin.CommonITPlugin]` and `commonit_metric: length` in a recipe."""

try:
    from axolotl_plugin.plugin import CommonITPlugin
except ImportError as error:
    # Axolotl prints an ImportError of a plugin and trains on without it (`PluginManager.register`); nothing else.
    raise RuntimeError(
        f"axolotl_plugin.CommonITPlugin cannot be imported ({type(error).__name__}: {error}), and training would go on "
        "with plain batches: install it with pip install 'commonit-trl[axolotl]', or remove it from plugins:."
    ) from error

__all__ = ["CommonITPlugin"]
