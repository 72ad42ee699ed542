"""Small layers that mixers and blocks are made of."""
