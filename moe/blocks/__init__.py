"""The parts of a decoder layer: norm, rope, attention, feed_forward, and the block that joins them."""
