"""Which number a weight becomes: nearest, searched scales, GPTQ, HSWQ, and the choice between them."""
