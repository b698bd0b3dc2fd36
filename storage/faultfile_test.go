package storage_test

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"

	"github.com/droverproject/drover/storage"
)

var errTest = errors.New("injected")

func newFault(t *testing.T, content string) (*storage.FaultFile, *storage.MemFile) {
	t.Helper()
	mem := storage.NewMemFile("mem")
	if _, err := mem.WriteAt([]byte(content), 0); err != nil {
		t.Fatal(err)
	}
	return storage.NewFaultFile(mem), mem
}

// Every kind of call can be failed, before it has an effect or after.
func TestFaultKinds(t *testing.T) {
	calls := map[storage.OpKind]func(f *storage.FaultFile) error{
		storage.OpRead:        func(f *storage.FaultFile) error { _, err := f.ReadAt(make([]byte, 4), 0); return err },
		storage.OpWrite:       func(f *storage.FaultFile) error { _, err := f.WriteAt([]byte("XXXX"), 4); return err },
		storage.OpSync:        func(f *storage.FaultFile) error { return f.Sync() },
		storage.OpTruncate:    func(f *storage.FaultFile) error { return f.Truncate(5) },
		storage.OpPunch:       func(f *storage.FaultFile) error { return f.PunchHole(0, 4) },
		storage.OpZero:        func(f *storage.FaultFile) error { return f.ZeroRange(0, 9) },
		storage.OpPreallocate: func(f *storage.FaultFile) error { return f.Preallocate(0, 9) },
	}
	effects := map[storage.OpKind]string{
		storage.OpWrite: "abcdXXXX", storage.OpTruncate: "abcde", storage.OpPunch: "\x00\x00\x00\x00efgh",
		storage.OpZero: "\x00\x00\x00\x00\x00\x00\x00\x00\x00", storage.OpPreallocate: "abcdefgh\x00",
	}
	for kind, call := range calls {
		for _, partial := range []int{0, storage.Whole} {
			f, mem := newFault(t, "abcdefgh")
			f.Inject(storage.Fault{Kind: kind, Err: errTest, Partial: partial})
			if err := call(f); err != errTest {
				t.Errorf("%v: %v, want the injected error", kind, err)
			}
			want := "abcdefgh"
			if effect, ok := effects[kind]; ok && partial == storage.Whole {
				want = effect
			}
			if got := string(readAll(t, mem)); got != want {
				t.Errorf("%v failing with partial %d leaves %q, want %q", kind, partial, got, want)
			}
			if err := call(f); err != nil {
				t.Errorf("%v after the fault: %v", kind, err)
			}
			if f.Calls(kind) != 2 || f.Calls(storage.OpAny) != 2 {
				t.Errorf("%v: %d calls of %d counted", kind, f.Calls(kind), f.Calls(storage.OpAny))
			}
		}
	}
}

func TestFaultPositions(t *testing.T) {
	f, _ := newFault(t, "")
	f.Inject(storage.Fault{Kind: storage.OpWrite, Skip: 2, Times: 2, Err: errTest})
	f.Inject(storage.Fault{Kind: storage.OpWrite, Skip: 6, Times: -1}) // EIO
	want := []error{nil, nil, errTest, errTest, nil, nil, nil, nil, syscall.EIO, syscall.EIO, syscall.EIO}
	for i, w := range want {
		f.ReadAt(make([]byte, 1), 0) // does not count
		if _, err := f.WriteAt([]byte("x"), int64(i)); err != w {
			t.Errorf("write %d: %v, want %v", i, err, w)
		}
	}
	f.Clear()
	if _, err := f.WriteAt([]byte("x"), 0); err != nil {
		t.Errorf("after Clear: %v", err)
	}
}

func TestFaultRange(t *testing.T) {
	f, _ := newFault(t, "")
	f.Inject(storage.Fault{Off: 100, Len: 10, Times: -1, Err: errTest})
	calls := map[string]struct {
		err  error
		fail bool
	}{
		"before":         {second(f.WriteAt(make([]byte, 100), 0)), false},
		"first byte":     {second(f.WriteAt(make([]byte, 101), 0)), true},
		"last byte":      {second(f.WriteAt(make([]byte, 1), 109)), true},
		"after":          {second(f.WriteAt(make([]byte, 100), 110)), false},
		"truncate below": {f.Truncate(50), true},
		"truncate above": {f.Truncate(200), false},
		"sync":           {f.Sync(), true},
	}
	for name, c := range calls {
		if (c.err == errTest) != c.fail {
			t.Errorf("%s: %v", name, c.err)
		}
	}
}

func second[A, B any](_ A, b B) B { return b }

func TestFaultPartial(t *testing.T) {
	for _, partial := range []int{0, 1, 3, 5, 6, 100} {
		f, mem := newFault(t, "abcdefgh")
		f.Inject(storage.Fault{Kind: storage.OpWrite, Err: syscall.ENOSPC, Partial: partial})
		n, err := f.WriteVAt([][]byte{[]byte("UVW"), nil, []byte("XYZ")}, 1)
		done := min(partial, 6)
		if n != done || err != syscall.ENOSPC {
			t.Errorf("partial %d: write = %d, %v", partial, n, err)
		}
		want := "a" + "UVWXYZ"[:done] + "bcdefg"[done:] + "h"
		if got := string(readAll(t, mem)); got != want {
			t.Errorf("partial %d leaves %q, want %q", partial, got, want)
		}
		f.Inject(storage.Fault{Kind: storage.OpRead, Err: io.ErrUnexpectedEOF, Partial: partial})
		p := []byte("......")
		if n, err := f.ReadAt(p, 1); n != done || err != io.ErrUnexpectedEOF || string(p) != want[1:1+done]+"......"[done:] {
			t.Errorf("partial %d: read = %d, %v, %q", partial, n, err, p)
		}
	}
}

func TestFaultBudget(t *testing.T) {
	f, mem := newFault(t, "abcdefgh")
	if err := f.SetBudget(4); err != nil {
		t.Fatal(err)
	}
	if n, err := f.WriteAt([]byte("inside"), 0); n != 6 || err != nil {
		t.Errorf("a write inside the file = %d, %v", n, err)
	}
	if n, err := f.WriteAt([]byte("123456"), 8); n != 4 || err != syscall.ENOSPC {
		t.Errorf("a write over the bound = %d, %v; want 4, ENOSPC", n, err)
	}
	if n, err := f.WriteAt([]byte("1"), 12); n != 0 || err != syscall.ENOSPC {
		t.Errorf("a write past the bound = %d, %v; want ENOSPC", n, err)
	}
	for name, err := range map[string]error{
		"Truncate": f.Truncate(13), "ZeroRange": f.ZeroRange(10, 3), "Preallocate": f.Preallocate(0, 13),
	} {
		if err != syscall.ENOSPC {
			t.Errorf("%s over the bound: %v, want ENOSPC", name, err)
		}
	}
	if got := string(readAll(t, mem)); got != "insidegh1234" {
		t.Errorf("content is %q", got)
	}
	if err := f.Truncate(8); err != nil {
		t.Errorf("shortening on a full disk: %v", err)
	}
	if _, err := f.WriteAt([]byte("room"), 8); err != nil {
		t.Errorf("a write into the room made: %v", err)
	}
	f.Clear()
	if _, err := f.WriteAt(bytes.Repeat([]byte("x"), 100), 12); err != nil {
		t.Errorf("after Clear: %v", err)
	}
}

// The hook sees each call, can hold one up while others pass, and can refuse it.
func TestFaultHook(t *testing.T) {
	f, mem := newFault(t, "")
	entered, leave := make(chan storage.Call), make(chan struct{})
	f.SetHook(func(c storage.Call) error {
		switch {
		case c.Kind == storage.OpSync:
			entered <- c
			<-leave
		case c.Kind == storage.OpWrite && c.Off == 100:
			return errTest
		}
		return nil
	})
	var wg sync.WaitGroup
	var syncErr error
	wg.Go(func() { syncErr = f.Sync() })
	if c := <-entered; c.Kind != storage.OpSync || c.Nth != 1 {
		t.Errorf("the hook saw %+v", c)
	}
	if _, err := f.WriteAt([]byte("passes"), 0); err != nil {
		t.Errorf("a write while the sync is held up: %v", err)
	}
	if _, err := f.WriteAt([]byte("refused"), 100); err != errTest {
		t.Errorf("a write that the hook refuses: %v", err)
	}
	close(leave)
	wg.Wait()
	if syncErr != nil || string(readAll(t, mem)) != "passes" {
		t.Errorf("Sync: %v, content %q", syncErr, readAll(t, mem))
	}
}
