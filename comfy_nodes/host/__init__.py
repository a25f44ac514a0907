"""The only code that imports ComfyUI: `comfy.*`, `folder_paths`, `latent_preview` and `nodes`."""
