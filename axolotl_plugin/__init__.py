"""CommonIT for Axolotl: `plugins: [axolotl_plugin.CommonITPlugin]` and `commonit_metric: length` in a recipe."""

try:
    from axolotl_plugin.plugin import CommonITPlugin
except ImportError as error:
    # Axolotl trains without a plugin that raises ImportError (`PluginManager.register`), so raise another error.
    raise RuntimeError(
        f"axolotl_plugin.CommonITPlugin cannot be imported ({type(error).__name__}: {error}), and training would "
        "continue with baseline batches. Run pip install 'commonit-trl[axolotl]', or remove the plugin from plugins:."
    ) from error

__all__ = ["CommonITPlugin"]
