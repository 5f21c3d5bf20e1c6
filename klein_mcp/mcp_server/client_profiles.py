"""Known MCP clients, and whether each shows images to its model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClientProfile:
    """One row of CLIENTS.

    name: prefix of clientInfo's name, in lower case. image_mode: inline, link or none.
    source: where its behaviour was reported. verified: whether our own tests confirm it.
    """

    name: str
    image_mode: str
    source: str
    verified: bool = False


# Reports by users and maintainers, autumn 2026. A client that drops an image still pays for its bytes, so it gets
# none; it can use the path in the text line.
CLIENTS = (
    ClientProfile("claude-code", "inline", "anthropics/claude-code CHANGELOG 2.1.122: resized and shown to the model"),
    ClientProfile("claude-ai", "inline", "anthropics/claude-ai-mcp#643: shown to the model, one turn late"),
    ClientProfile("codex", "inline", "openai/codex source: input_image where there is no structuredContent"),
    ClientProfile("gemini-cli", "inline", "google-gemini/gemini-cli source: inlineData"),
    ClientProfile("cursor", "inline", "Cursor 0.49 release notes"),
    ClientProfile("visual studio code", "inline", "vscode source, mcpLanguageModelToolContribution.ts"),
    ClientProfile("goose", "inline", "block/goose source"),
    ClientProfile("opencode", "inline", "sst/opencode#34505"),
    ClientProfile("librechat", "inline", "danny-avila/LibreChat parsers"),
    ClientProfile("copilot-cli", "link", "github/copilot-cli#4536: images are dropped"),
    ClientProfile("github-copilot-cli", "link", "github/copilot-cli#4536: images are dropped"),
    ClientProfile("zed", "link", "zed-industries/zed#49615, #52765: images are ignored"),
    ClientProfile("lm-studio", "link", "lmstudio-ai/lmstudio-bug-tracker#1746: images are stripped"),
    ClientProfile("lmstudio", "link", "lmstudio-ai/lmstudio-bug-tracker#1746: images are stripped"),
    ClientProfile("mcp", "inline", "the SDK's own client, which our tests drive", verified=True),
)


def image_mode(name: str) -> str:
    """Return inline, link or none for a client's name.

    Unknown clients get inline: one preview is within every known limit.
    """
    known = [client for client in CLIENTS if name.lower().startswith(client.name)]
    return max(known, key=lambda client: len(client.name)).image_mode if known else "inline"
