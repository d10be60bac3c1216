"""Between our models and Hugging Face's."""
