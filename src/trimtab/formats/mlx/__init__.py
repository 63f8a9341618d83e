"""MLX's affine layout, for mlx-lm."""
