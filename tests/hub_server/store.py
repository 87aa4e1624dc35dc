# SPDX-License-Identifier: Apache-2.0
"""Users, repositories, commits and files of a Hub, in memory and without HTTP (except status codes)."""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

LARGE = (
    ".safetensors", ".pt", ".pth", ".bin", ".parquet", ".png", ".jpg", ".webp",
    ".faiss", ".npy", ".npz", ".tar", ".zip",
)  # fmt: skip
LARGEST_REGULAR = 10_000_000
KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}
FIRST_FILES = {".gitattributes": "".join(f"*{ending} filter=lfs\n" for ending in LARGE).encode()}


class Refused(Exception):
    """An error answer: HTTP status, error code of the Hub, and message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class User:
    """The user of a token; `role` is "write" or "read"."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether git stores an LFS pointer instead of it."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        )
        return text.encode()

    @property
    def oid(self) -> str:
        """Return the hash of git for the stored content."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A state of a repository: all files, and the paths that this commit added and deleted."""

    oid: str
    files: dict[str, Blob]
    summary: str
    added: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


@dataclass
class Repo:
    """A repository; `kind` is "models", "datasets" or "spaces"."""

    kind: str
    id: str
    private: bool = False
    sdk: str | None = None
    commits: list[Commit] = field(default_factory=list)  # all, oldest first
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.at("main")

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, a tag or an oid."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def file(self, revision: str, path: str) -> Blob:
        files = self.at(revision).files
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        return files[path]

    def commit(self, branch: str, summary: str, add: dict[str, Blob], delete: tuple[str, ...] = ()) -> Commit:
        """Add a commit to `branch`, completely or not at all."""
        before = self.at(branch).files if self.commits else {}
        gone = [
            path for path in before if path in delete or path.startswith(tuple(f"{item}/" for item in delete))
        ]
        if len(delete) > len(gone):
            raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        files = {path: blob for path, blob in before.items() if path not in gone} | add
        state = [len(self.commits), summary, sorted((path, blob.oid) for path, blob in files.items())]
        oid = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        self.commits.append(Commit(oid, files, summary, tuple(add), tuple(gone)))
        self.branches[branch] = oid
        return self.commits[-1]


class Store:
    """The content of a Hub."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}  # by token
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.parts: dict[tuple[str, int], bytes] = {}  # of large files that are uploaded in parts

    def add_repo(
        self, kind: str, repo_id: str, files: dict[str, bytes] | Path | None = None, private: bool = False
    ) -> Repo:
        """Return a new repository with its first commit; `files` are contents by path, or a folder."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        repo.commit("main", "initial commit", self.blobs(FIRST_FILES))
        if isinstance(files, Path):
            root, found = files, sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(root).as_posix(): path.read_bytes() for path in found}
        if files:
            repo.commit("main", "files", self.blobs(files))
        return repo

    def blobs(self, files: dict[str, bytes]) -> dict[str, Blob]:
        return {path: Blob(data, is_large(path, len(data), data[:512])) for path, data in files.items()}

    def model(self, repo_id: str) -> Repo:
        return self.repos["models", repo_id]

    def user(self, token: str | None) -> User | None:
        """Return the user of a token, or None without a token."""
        if token is None:
            return None
        if token not in self.users:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.users[token]

    def readable(self, kind: str, repo_id: str, user: User | None) -> Repo:
        """Return a repository; raise the error of a missing one if `user` may not read it."""
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not may_write(user, repo_id, {"read", "write"})):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    def writable(self, kind: str, repo_id: str, user: User | None) -> Repo:
        repo = self.readable(kind, repo_id, user)
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        if not may_write(user, repo_id):
            raise Refused(403, "", f"Forbidden: you must have write access to {repo_id}")
        return repo

    def create(self, request: dict, user: User | None) -> tuple[Repo, bool]:
        """Return the repository for POST /api/repos/create, and whether it is new."""
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        namespace = request.get("organization") or user.name
        repo_id, kind = f"{namespace}/{request['name']}", KINDS[request.get("type") or "model"]
        if not may_write(user, repo_id):
            message = f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"'
            raise Refused(403, "", message)
        if (kind, repo_id) in self.repos:
            return self.repos[kind, repo_id], False
        private = request.get("private") or request.get("visibility") == "private"
        repo = self.add_repo(kind, repo_id, private=bool(private))
        repo.sdk = request.get("sdk")
        return repo, True

    def put_object(self, sha256: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refused(400, "", "the content does not match its sha256")
        self.objects[sha256] = data

    def apply(self, repo: Repo, branch: str, lines: list[dict]) -> Commit:
        """Apply the lines of POST .../commit/{branch}."""
        header, add, delete = lines[0]["value"], {}, []
        if header.get("parentCommit") not in (None, repo.at(branch).oid):
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                add[value["path"]] = Blob(decode(value), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, "", f"LFS object of {value['path']} has not been uploaded")
                add[value["path"]] = Blob(self.objects[value["oid"]], lfs=True)
            else:
                delete.append(value["path"].rstrip("/"))
        return repo.commit(branch, header["summary"], add, tuple(delete))


def decode(value: dict) -> bytes:
    """Return the content of a "file" line."""
    return (
        base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
    )


def may_write(user: User | None, repo_id: str, roles: set[str] | None = None) -> bool:
    """Return whether `user` may access the namespace with a token of one of `roles` (default: write)."""
    if user is None or user.role not in (roles or {"write"}):
        return False
    return repo_id.split("/")[0] in (user.name, *user.orgs)


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Return whether git stores a pointer: known suffixes, large files, and binary files."""
    return bool(size) and (path.endswith(LARGE) or size > LARGEST_REGULAR or b"\0" in sample)
