"""How synthetic scenes are drawn and worded; `genlip_mlx.data.synthetic` is the way in."""
