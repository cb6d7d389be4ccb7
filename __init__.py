"""ComfyUI's door: registers the nodes, nothing else."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import MemoExtension

    return MemoExtension()
