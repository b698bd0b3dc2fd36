package storage

import (
	"bytes"
	"path/filepath"
	"sync"
	"testing"
)

// TestWriteBehind: the host is asked to write whenever there is enough, by one writer at a time, and the file holds what was
// written.
func TestWriteBehind(t *testing.T) {
	f, err := CreateFile(filepath.Join(t.TempDir(), "image"), OpenOptions{WriteBehind: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const piece, writers = 1 << 20, 4
	each := int64(behindBytes/piece + 1) // in all more than enough
	content := func(off int64) []byte { return bytes.Repeat([]byte{byte(off / piece), 1}, piece/2) }
	var wg sync.WaitGroup
	for w := range int64(writers) {
		wg.Go(func() {
			for k := range each {
				off := (w*each + k) * piece
				if _, err := f.WriteAt(content(off), off); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if total := writers * each * piece; f.behind.unsent.Load() >= total {
		t.Errorf("the host was asked for none of %d bytes", total)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, piece)
	for off := int64(0); off < writers*each*piece; off += piece {
		if _, err := f.ReadAt(buf, off); err != nil || !bytes.Equal(buf, content(off)) {
			t.Fatalf("at %d: %v", off, err)
		}
	}
	for _, o := range []OpenOptions{{}, {ReadOnly: true, WriteBehind: true}} {
		other, err := OpenFile(f.name, o)
		if err != nil {
			t.Fatal(err)
		}
		if other.behind != nil {
			t.Errorf("%+v: there is nothing to write", o)
		}
		if err := other.Close(); err != nil {
			t.Error(err)
		}
	}
}
