"""The FUSE mount: kernel requests in, masters' RPC and chunk data out."""
