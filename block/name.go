package block

import (
	"fmt"
	"path/filepath"
	"strings"
)

// maxNameLen bounds a file name; longer ones cannot exist and would only end up in messages.
const maxNameLen = 4096

// SplitProtocol cuts a name into what stands before its first colon, if that comes before any slash, and the rest.
// "./a:b" and "/a:b" are plain names, "nbd:x" is not, nor is ":x", whose protocol has no name. "file:" is the protocol of
// plain names and is taken off.
func SplitProtocol(name string) (protocol, rest string, plain bool) {
	if filepath.VolumeName(name) != "" { // a drive letter is not a protocol
		return "", name, true
	}
	i := strings.IndexAny(name, ":/")
	if i < 0 || name[i] != ':' {
		return "", name, true
	}
	if name[:i] == "file" {
		return "", name[i+1:], true
	}
	return name[:i], name[i+1:], false
}

// PlainName returns the file that a name given by the user stands for. It refuses names of things that are not files.
func PlainName(name string) (string, error) {
	protocol, rest, plain := SplitProtocol(name)
	switch {
	case !plain:
		return "", fmt.Errorf("%q: %w: %q (for a file of this name write %q)", name, ErrProtocol, protocol, "./"+name)
	case rest == "":
		return "", fmt.Errorf("%q is not a file name", name)
	case len(rest) > maxNameLen:
		return "", fmt.Errorf("file name of %d bytes is too long", len(rest))
	}
	return rest, nil
}

// ResolveName returns the path of a file that an image refers to by a plain name: relative names are relative to the
// folder of the image, by the name under which the image was opened. The result is not cleaned, since "a/../b" is not
// "b" when a is a symbolic link.
func ResolveName(image, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	i := strings.LastIndexByte(filepath.ToSlash(image), '/')
	return image[:i+1] + name
}
