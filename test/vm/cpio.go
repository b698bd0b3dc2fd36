package vm

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"strings"
)

// archive writes a cpio archive of the kind that the kernel unpacks at boot (newc). The kernel makes no folders by itself,
// so each file's come before it.
type archive struct {
	w     *bufio.Writer
	n     int64
	inode int
	made  map[string]bool
	err   error
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), made: map[string]bool{"": true, ".": true, "/": true}}
}

// Modes of the kinds of files.
const (
	modeFolder = 0o040755
	modeFile   = 0o100755
	modeLink   = 0o120777
)

func (a *archive) folder(name string) {
	name = strings.Trim(name, "/")
	if a.made[name] {
		return
	}
	a.folder(path.Dir(name))
	a.made[name] = true
	a.entry(name, modeFolder, nil)
}

func (a *archive) file(name string, data []byte) {
	a.folder(path.Dir(strings.Trim(name, "/")))
	a.entry(name, modeFile, data)
}

func (a *archive) link(name, target string) {
	a.folder(path.Dir(strings.Trim(name, "/")))
	a.entry(name, modeLink, []byte(target))
}

func (a *archive) entry(name string, mode uint32, data []byte) {
	name = strings.Trim(name, "/")
	a.inode++
	a.printf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0,
		len(name)+1, 0)
	a.write([]byte(name + "\x00"))
	a.pad()
	a.write(data)
	a.pad()
}

func (a *archive) printf(f string, v ...any) { a.write(fmt.Appendf(nil, f, v...)) }

func (a *archive) write(p []byte) {
	if a.err == nil {
		_, a.err = a.w.Write(p)
	}
	a.n += int64(len(p))
}

// pad fills up to a multiple of four bytes.
func (a *archive) pad() { a.write(make([]byte, -a.n&3)) }

// close ends the archive.
func (a *archive) close() error {
	a.entry("TRAILER!!!", 0, nil)
	if a.err != nil {
		return a.err
	}
	return a.w.Flush()
}
