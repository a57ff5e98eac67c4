"""Writers: each turns the stream of quantized layers into one form of checkpoint, in a directory that it owns."""
