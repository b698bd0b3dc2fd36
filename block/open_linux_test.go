package block_test

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/storage"
)

// TestFIFO: opening one must be refused, not wait for a writer.
func TestFIFO(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := block.Open(t.Context(), fifo, block.OpenOptions{Format: "raw", ReadOnly: true})
	if !errors.Is(err, storage.ErrFileType) {
		t.Errorf("opening a FIFO: %v", err)
	}
}
