"""The compiled extension; csrc/bindings.cpp lists its launchers with their argument names."""

from typing import Any

def __getattr__(name: str) -> Any: ...
