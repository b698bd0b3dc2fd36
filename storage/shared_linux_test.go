package storage

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestShared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "memory")
	if _, err := OpenShared(path, 8192, false); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a file that is not there: %v", err)
	}
	s, err := OpenShared(path, 8192, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Bytes()) != 8192 {
		t.Fatalf("%d bytes", len(s.Bytes()))
	}
	s.Bytes()[8191] = 7
	if _, err := OpenShared(path, 8192, true); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("opened twice: %v", err)
	}
	if err := s.Close(false); err != nil {
		t.Fatal(err)
	}
	if s, err = OpenShared(path, 4096, false); err != nil {
		t.Fatal(err)
	}
	if len(s.Bytes()) != 8192 || s.Bytes()[8191] != 7 {
		t.Error("what it held is gone")
	}
	if err := s.Close(true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is still there: %v", err)
	}
}

// TestSharedRefuses: what somebody else could change, or put in the way, is no memory.
func TestSharedRefuses(t *testing.T) {
	dir := t.TempDir()
	for name, make := range map[string]func(path string) error{
		"writable for others": func(p string) error {
			return errors.Join(os.WriteFile(p, make([]byte, 8192), 0o600), os.Chmod(p, 0o622))
		},
		"symbolic link": func(p string) error {
			return errors.Join(os.WriteFile(p+".target", make([]byte, 8192), 0o600), os.Symlink(p+".target", p))
		},
		"FIFO":   func(p string) error { return unix.Mkfifo(p, 0o600) },
		"folder": func(p string) error { return os.Mkdir(p, 0o700) },
		"huge":   func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, maxShared+1)) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name)
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			if s, err := OpenShared(path, 8192, true); err == nil {
				t.Errorf("accepted, with %d bytes", len(s.Bytes()))
			}
		})
	}
}
