"""Key-value cache: what attention has seen so far, so that sampling runs each token once."""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, with room for `max_length` tokens.

    Letters: G key-value heads, P tokens so far, d width of a head.
    """

    def __init__(self, *, max_length: int) -> None:
        self.length = 0
        self._max_length = max_length
        # [B, G, max_length, d], made at the first append, which brings shape, dtype and device
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(self, key_BGSd: Tensor, value_BGSd: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return (key_BGPd, value_BGPd) of all tokens so far, the new ones last.

        Raises:
            ValueError: more tokens than there is room for.
        """
        end = self.length + key_BGSd.shape[2]
        if end > self._max_length:
            raise ValueError(f"{end} tokens do not fit a cache of max_length = {self._max_length}; make it longer")
        if self._key is None or self._value is None:
            B, G, _, d = key_BGSd.shape
            self._key = key_BGSd.new_empty(B, G, self._max_length, d)
            self._value = value_BGSd.new_empty(B, G, self._max_length, value_BGSd.shape[3])
        self._key[:, :, self.length : end] = key_BGSd
        self._value[:, :, self.length : end] = value_BGSd
        self.length = end
        return self._key[:, :, :end], self._value[:, :, :end]


class KeyValueCache:
    """The caches of all layers of a model; made by the caller, filled by `Model.forward` under no_grad."""

    def __init__(self, *, num_layers: int, max_length: int) -> None:
        self.layers = [LayerCache(max_length=max_length) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length
