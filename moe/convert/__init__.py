"""Between our models and Hugging Face's. Importing this package alone does not import transformers."""


class ConversionError(ValueError):
    """A checkpoint or a model cannot be converted; the message names the field or the tensor and the remedy."""
