"""The reference in Triton, whose only importer this package is.

`append` stores and indexes tokens, `retrieve` chooses those to attend to, `attention` attends; the
other modules hold their kernels. Nothing is imported before a layer asks for it.
"""
