def run(out, seeds):
    raise NotImplementedError
