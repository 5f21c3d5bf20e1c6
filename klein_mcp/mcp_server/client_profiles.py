"""What each known client does with a picture in a result, and so how one is shown where nobody says."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Client:
    """name: as clientInfo says it, in lower case; a prefix. source: where it was reported. verified: seen by us."""

    name: str
    show: str
    source: str
    verified: bool = False


# Reports by users and maintainers, autumn 2026. A client that drops a picture still pays for its bytes, so it gets
# none; the path in the text line is what it can use.
CLIENTS = (
    Client("claude-code", "inline", "anthropics/claude-code CHANGELOG 2.1.122: resized and shown to the model"),
    Client("claude-ai", "inline", "anthropics/claude-ai-mcp#643: shown to the model, one turn late"),
    Client("codex", "inline", "openai/codex source: input_image where there is no structuredContent"),
    Client("gemini-cli", "inline", "google-gemini/gemini-cli source: inlineData"),
    Client("cursor", "inline", "Cursor 0.49 release notes"),
    Client("visual studio code", "inline", "vscode source, mcpLanguageModelToolContribution.ts"),
    Client("goose", "inline", "block/goose source"),
    Client("opencode", "inline", "sst/opencode#34505"),
    Client("librechat", "inline", "danny-avila/LibreChat parsers"),
    Client("copilot-cli", "link", "github/copilot-cli#4536: pictures are dropped"),
    Client("github-copilot-cli", "link", "github/copilot-cli#4536: pictures are dropped"),
    Client("zed", "link", "zed-industries/zed#49615, #52765: pictures are ignored"),
    Client("lm-studio", "link", "lmstudio-ai/lmstudio-bug-tracker#1746: pictures are stripped"),
    Client("lmstudio", "link", "lmstudio-ai/lmstudio-bug-tracker#1746: pictures are stripped"),
    Client("mcp", "inline", "the SDK's own client, which our tests drive", verified=True),
)


def how_to_show(name: str) -> str:
    """inline for whoever we do not know: one preview is within every limit we know of."""
    known = [client for client in CLIENTS if name.lower().startswith(client.name)]
    return max(known, key=lambda client: len(client.name)).show if known else "inline"
