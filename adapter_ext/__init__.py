from adapter_ext.ops import linear_adapter, route
from adapter_ext.types import AdapterWeights, Routing

__all__ = ["AdapterWeights", "Routing", "linear_adapter", "route"]
