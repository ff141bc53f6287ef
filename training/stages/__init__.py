"""The training stages: pretrain (tiny only), adapt, align, project."""
