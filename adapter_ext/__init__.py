"""NeMo's adapter API on native PyTorch ops: one batch, every row its own adapter."""

from adapter_ext import _library, optim
from adapter_ext.access import AccessMixin, set_access_cfg
from adapter_ext.adapters import (
    AdapterConfig,
    AdapterModuleUtil,
    LinearAdapter,
    LinearAdapterConfig,
)
from adapter_ext.any_model import (
    add_adapter,
    checkpoint_context,
    load_adapters,
    remove_adapter,
    rename_adapter,
    save_adapters,
    set_enabled_adapters,
    unfreeze_enabled_adapters,
)
from adapter_ext.files import FileError
from adapter_ext.injection import eject, inject
from adapter_ext.listing import AdapterInfo, AdapterTable
from adapter_ext.mixin import (
    AdapterModuleMixin,
    adapter_losses,
    list_adapters,
    reset_adapter_losses,
)
from adapter_ext.model import ModelPT, NeuralModule
from adapter_ext.model_mixin import (
    AdapterModelPTMixin,
    _prepare_default_adapter_config,
    update_module_class_with_adapter_class,
)
from adapter_ext.ops import linear_adapter, route
from adapter_ext.registry import (
    AdapterRegistryInfo,
    get_registered_adapter,
    instantiate,
    register_adapter,
    register_target,
)
from adapter_ext.routing import adapter_index, route_adapters
from adapter_ext.strategies import (
    AbstractAdapterStrategy,
    ResidualAddAdapterStrategy,
    ResidualAddAdapterStrategyConfig,
    ReturnResultAdapterStrategy,
    ReturnResultAdapterStrategyConfig,
)
from adapter_ext.types import AdapterWeights, Routing

__version__ = _library.VERSION

__all__ = [
    "AbstractAdapterStrategy",
    "AccessMixin",
    "AdapterConfig",
    "AdapterInfo",
    "AdapterModelPTMixin",
    "AdapterModuleMixin",
    "AdapterModuleUtil",
    "AdapterRegistryInfo",
    "AdapterTable",
    "AdapterWeights",
    "FileError",
    "LinearAdapter",
    "LinearAdapterConfig",
    "ModelPT",
    "NeuralModule",
    "ResidualAddAdapterStrategy",
    "ResidualAddAdapterStrategyConfig",
    "ReturnResultAdapterStrategy",
    "ReturnResultAdapterStrategyConfig",
    "Routing",
    "_prepare_default_adapter_config",
    "adapter_index",
    "adapter_losses",
    "add_adapter",
    "checkpoint_context",
    "eject",
    "get_registered_adapter",
    "inject",
    "instantiate",
    "linear_adapter",
    "list_adapters",
    "load_adapters",
    "optim",
    "register_adapter",
    "register_target",
    "remove_adapter",
    "rename_adapter",
    "reset_adapter_losses",
    "route",
    "route_adapters",
    "save_adapters",
    "set_access_cfg",
    "set_enabled_adapters",
    "unfreeze_enabled_adapters",
    "update_module_class_with_adapter_class",
]
