package nbd_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"reflect"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// refused asks for an option that has to be refused in a certain way; the handshake has to go on.
func refused(t *testing.T, c *nbdtest.Client, opt uint32, data []byte, want uint32) {
	t.Helper()
	list, err := c.Option(opt, data)
	if err != nil {
		t.Fatal(err)
	}
	if got := list[len(list)-1].Type; got != want {
		t.Errorf("option %d with %q got %#x, want %#x", opt, data, got, want)
	}
}

func TestHandshakeInfo(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(1<<20 + 513)
	dev.DeviceInfo.PreferAlign = 64 << 10
	ro := nbdtest.NewDevice(512)
	ro.DeviceInfo.ReadOnly = true
	s := start(t, nbd.Options{},
		nbd.Export{Name: "b", Description: "the second", Device: dev}, nbd.Export{Name: "a", Device: ro})
	c := s.dial()
	if err := c.Info("b"); err != nil {
		t.Fatal(err)
	}
	const rw = 1 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<8 | 1<<10 | 1<<11
	if c.Size != 1<<20+513 || c.TxFlags != rw || c.Name != "b" || c.Description != "the second" {
		t.Errorf("INFO: size %d, flags %#x, name %q, description %q", c.Size, c.TxFlags, c.Name, c.Description)
	}
	if want := [3]uint32{1, 64 << 10, 32 << 20}; c.BlockSizes != want {
		t.Errorf("block sizes %v, want %v", c.BlockSizes, want)
	}
	if err := c.WantStructured(); err != nil {
		t.Fatal(err)
	}
	if err := c.Go("a"); err != nil {
		t.Fatal(err)
	}
	if want := uint16(1 | 1<<1 | 1<<2 | 1<<3 | 1<<7 | 1<<8 | 1<<10); c.TxFlags != want || c.Size != 512 {
		t.Errorf("GO: flags %#x, want %#x; size %d", c.TxFlags, want, c.Size)
	}
	do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 512}, 0)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestHandshakeList(t *testing.T) {
	dev := nbdtest.NewDevice(512)
	s := start(t, nbd.Options{}, nbd.Export{Name: "z", Device: dev, Description: "last"},
		nbd.Export{Device: dev}, nbd.Export{Name: "m", Device: dev})
	c := s.dial()
	list, err := c.Must(nbdtest.OptList, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range list {
		n := binary.BigEndian.Uint32(r.Data)
		got = append(got, string(r.Data[4:4+n])+"|"+string(r.Data[4+n:]))
	}
	if want := []string{"|", "m|", "z|last"}; !reflect.DeepEqual(got, want) {
		t.Errorf("LIST: %q, want %q", got, want)
	}
	if _, err := c.Must(nbdtest.OptAbort, nil); err != nil {
		t.Error(err)
	}
	if _, err := c.Option(nbdtest.OptList, nil); err == nil {
		t.Error("the connection lives on after ABORT")
	}
}

func TestHandshakeRefusals(t *testing.T) {
	s := start(t, nbd.Options{}, nbd.Export{Name: "x", Device: nbdtest.NewDevice(512)})
	c := s.dial()
	bad := func(data []byte, cut int) []byte { return data[:len(data)-cut] }
	long := strings.Repeat("n", 4097)
	refused(t, c, nbdtest.OptStartTLS, nil, nbdtest.RepErrUnsup)
	refused(t, c, nbdtest.OptStartTLS, []byte("x"), nbdtest.RepErrInvalid)
	refused(t, c, 99, []byte("anything"), nbdtest.RepErrUnsup)
	refused(t, c, nbdtest.OptList, []byte("x"), nbdtest.RepErrInvalid)
	refused(t, c, nbdtest.OptGo, nil, nbdtest.RepErrInvalid)
	refused(t, c, nbdtest.OptGo, nbdtest.GoData("y"), nbdtest.RepErrUnknown)
	refused(t, c, nbdtest.OptInfo, nbdtest.GoData(""), nbdtest.RepErrUnknown)
	refused(t, c, nbdtest.OptGo, nbdtest.GoData(long), nbdtest.RepErrTooBig)
	refused(t, c, nbdtest.OptGo, bad(nbdtest.GoData("x", 3), 1), nbdtest.RepErrInvalid)
	refused(t, c, nbdtest.OptGo, append(nbdtest.GoData("x", 3), 0), nbdtest.RepErrInvalid)
	refused(t, c, nbdtest.OptGo, []byte{0xff, 0xff, 0xff, 0xff, 'x', 0, 0}, nbdtest.RepErrInvalid)
	refused(t, c, nbdtest.OptSetMeta, nbdtest.MetaData("x"), nbdtest.RepErrInvalid) // not structured
	refused(t, c, nbdtest.OptStructuredReply, []byte("x"), nbdtest.RepErrInvalid)
	if err := c.WantStructured(); err != nil {
		t.Fatal(err)
	}
	refused(t, c, nbdtest.OptStructuredReply, nil, nbdtest.RepErrInvalid)
	refused(t, c, nbdtest.OptListMeta, nbdtest.MetaData("y"), nbdtest.RepErrUnknown)
	refused(t, c, nbdtest.OptListMeta, nbdtest.MetaData("x", long), nbdtest.RepErrTooBig)
	refused(t, c, nbdtest.OptListMeta, nbdtest.MetaData("x", make([]string, 1025)...), nbdtest.RepErrTooBig)
	refused(t, c, nbdtest.OptListMeta, bad(nbdtest.MetaData("x", "base:"), 1), nbdtest.RepErrInvalid)
	refused(t, c, nbdtest.OptListMeta, append(nbdtest.MetaData("x", "base:"), 0), nbdtest.RepErrInvalid)
	if err := c.WantExtended(); err != nil {
		t.Fatal(err)
	}
	refused(t, c, nbdtest.OptExtendedHeaders, nil, nbdtest.RepErrInvalid)
	refused(t, c, nbdtest.OptStructuredReply, nil, nbdtest.RepErrExtHeader)
	if err := c.Go("x"); err != nil {
		t.Fatal(err)
	}
}

func TestHandshakeDrops(t *testing.T) {
	noLeaks(t)
	s := start(t, nbd.Options{}, nbd.Export{Name: "x", Device: nbdtest.NewDevice(512)})
	greeting := "\x00\x00\x00\x03"
	var many []byte
	for range 1025 {
		many = append(many, "IHAVEOPT\x00\x00\x00\x63\x00\x00\x00\x00"...)
	}
	for name, text := range map[string]string{
		"unknown client flags":     "\x00\x00\x00\x07",
		"wrong option magic":       greeting + "IHAVEOPS\x00\x00\x00\x03\x00\x00\x00\x00",
		"option of 64 KiB + 1":     greeting + "IHAVEOPT\x00\x00\x00\x63\x00\x01\x00\x01",
		"unknown name, old way":    greeting + "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x01y",
		"long name, old way":       greeting + "IHAVEOPT\x00\x00\x00\x01\x00\x00\x10\x01" + strings.Repeat("x", 4097),
		"option without newstyle":  "\x00\x00\x00\x00IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00",
		"more options than enough": greeting + string(many),
	} {
		c, err := net.Dial(s.network, s.addr)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			// The server may hang up before it has read everything.
			_, _ = c.Write([]byte(text))
			p := make([]byte, 4096)
			for {
				if _, err := c.Read(p); err != nil {
					done <- err
					return
				}
			}
		}()
		wait(t, done, "hanging up on "+name)
		c.Close()
	}
}

func TestExportName(t *testing.T) {
	dev := nbdtest.NewDevice(4096)
	s := start(t, nbd.Options{DefaultExport: "x"}, nbd.Export{Name: "x", Device: dev})
	for _, name := range []string{"x", ""} {
		c := s.dial()
		if err := c.ExportName(name); err != nil {
			t.Fatal(err)
		}
		if c.Size != 4096 {
			t.Errorf("size %d", c.Size)
		}
		do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Data: []byte("hello")}, 0)
		if got := do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 5}, 0); string(got.Data) != "hello" {
			t.Errorf("read %q", got.Data)
		}
	}
	// A client that does not know NO_ZEROES gets 124 of them, and one that pipelines its first request is understood.
	nc, err := net.Dial(s.network, s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c := &nbdtest.Client{}
	text := append([]byte("\x00\x00\x00\x00IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x01x"),
		c.Encode(nil, nbdtest.Request{Cmd: nbdtest.Read, Length: 5, Cookie: 7})...)
	if _, err := nc.Write(append(text, c.Encode(nil, nbdtest.Request{Cmd: nbdtest.Disc})...)); err != nil {
		t.Fatal(err)
	}
	got := readAll(t, nc)
	want := "NBDMAGICIHAVEOPT\x00\x03" + "\x00\x00\x00\x00\x00\x00\x10\x00" + "\x0d\x6d" + strings.Repeat("\x00", 124) +
		"\x67\x44\x66\x98\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07hello"
	if string(got) != want {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
}

func TestMetaContexts(t *testing.T) {
	status := func(ctx context.Context, off, n int64, fn func(int64, uint32) bool) error { fn(n, 1); return nil }
	s := start(t, nbd.Options{}, nbd.Export{Name: "x", Device: nbdtest.NewDevice(4096), Contexts: []nbd.Context{
		{Name: "qemu:dirty-bitmap:b0", BlockStatus: status}, {Name: "qemu:dirty-bitmap:b1", BlockStatus: status},
	}}, nbd.Export{Name: "y", Device: nbdtest.NewDevice(4096)})
	c := s.dial()
	if err := c.WantStructured(); err != nil {
		t.Fatal(err)
	}
	const base, depth, b0, b1 = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"
	for _, q := range []struct {
		opt     uint32
		queries []string
		want    []string
	}{
		{nbdtest.OptListMeta, nil, []string{base, depth, b0, b1}},
		{nbdtest.OptListMeta, []string{"base:"}, []string{base}},
		{nbdtest.OptListMeta, []string{"qemu:"}, []string{depth, b0, b1}},
		{nbdtest.OptListMeta, []string{"qemu:dirty-bitmap:"}, []string{b0, b1}},
		{nbdtest.OptListMeta, []string{"base:allocation", "nosuch:", "x", ""}, []string{base}},
		{nbdtest.OptSetMeta, nil, nil},
		{nbdtest.OptSetMeta, []string{"base:", "qemu:"}, nil},
		{nbdtest.OptSetMeta, []string{b1, base, base}, []string{base, b1}},
	} {
		got, err := c.Meta(q.opt, "x", q.queries...)
		if err != nil {
			t.Fatal(err)
		}
		ids := make(map[uint32]bool)
		for _, w := range q.want {
			id, ok := got[w]
			if !ok || q.opt == nbdtest.OptSetMeta && ids[id] {
				t.Errorf("option %d with %q: %v", q.opt, q.queries, got)
			}
			ids[id] = true
		}
		if len(got) != len(q.want) {
			t.Errorf("option %d with %q: %v, want %q", q.opt, q.queries, got, q.want)
		}
	}
	// The selection was for another export.
	if err := c.Go("y"); err != nil {
		t.Fatal(err)
	}
	do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus, Length: 4096}, 22)
}

func TestAddExportRefuses(t *testing.T) {
	s := nbd.NewServer(nbd.Options{})
	dev := nbdtest.NewDevice(512)
	status := func(ctx context.Context, off, n int64, fn func(int64, uint32) bool) error { return nil }
	for name, e := range map[string]nbd.Export{
		"no device":                 {},
		"long name":                 {Device: dev, Name: strings.Repeat("x", 4097)},
		"long description":          {Device: dev, Description: strings.Repeat("x", 4097)},
		"context without namespace": {Device: dev, Contexts: []nbd.Context{{Name: "x", BlockStatus: status}}},
		"context without function":  {Device: dev, Contexts: []nbd.Context{{Name: "x:y"}}},
		"context that exists":       {Device: dev, Contexts: []nbd.Context{{Name: "base:allocation", BlockStatus: status}}},
	} {
		if err := s.AddExport(e); err == nil {
			t.Errorf("AddExport accepted one with %s", name)
		}
	}
	if err := s.AddExport(nbd.Export{Name: "x", Device: dev}); err != nil {
		t.Fatal(err)
	}
	if err := s.AddExport(nbd.Export{Name: "x", Device: dev}); err == nil {
		t.Error("AddExport accepted a name twice")
	}
	if err := s.RemoveExport(context.Background(), "y"); !errors.Is(err, nbd.ErrNoExport) {
		t.Errorf("RemoveExport: %v", err)
	}
	if err := s.RemoveExport(context.Background(), "x"); err != nil {
		t.Errorf("RemoveExport: %v", err)
	}
	if err := s.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	if err := s.AddExport(nbd.Export{Name: "x", Device: dev}); !errors.Is(err, nbd.ErrServerClosed) {
		t.Errorf("AddExport after Shutdown: %v", err)
	}
}

// chain is a device with extents of its own making.
type chain struct {
	*nbdtest.Device
	extents []block.Extent
}

func (d chain) Extents(ctx context.Context, off, n int64, fn func(block.Extent) bool) error {
	for _, e := range d.extents {
		from, to := max(e.Off, off), min(e.End(), off+n)
		if from >= to {
			continue
		}
		e.Off, e.Len = from, to-from
		if !fn(e) {
			return nil
		}
	}
	return nil
}

// runs makes a list of lengths and states.
func runs(pairs ...uint64) []nbdtest.Status {
	var list []nbdtest.Status
	for i := 0; i < len(pairs); i += 2 {
		list = append(list, nbdtest.Status{Length: pairs[i], State: pairs[i+1]})
	}
	return list
}

func TestBlockStatus(t *testing.T) {
	const k = 64 << 10
	dev := chain{Device: nbdtest.NewDevice(16 * k), extents: []block.Extent{
		{Off: 0, Len: k, Allocated: true, Data: true},
		{Off: k, Len: k, Allocated: true, Data: true, Compressed: true}, // the same to NBD
		{Off: 2 * k, Len: k, Allocated: true, Data: true, Depth: 2},
		{Off: 3 * k, Len: k, Allocated: true, Zero: true, Depth: 1},
		{Off: 4 * k, Len: k, Allocated: true, Data: true, Zero: true},
		{Off: 5 * k, Len: 11 * k, Zero: true, Depth: 2},
	}}
	s := start(t, nbd.Options{}, nbd.Export{Device: dev})
	for _, m := range modes[1:] {
		c := s.dial()
		var err error
		if m == structured {
			err = c.WantStructured()
		} else {
			err = c.WantExtended()
		}
		if err != nil {
			t.Fatal(err)
		}
		ids, err := c.Meta(nbdtest.OptSetMeta, "", "base:allocation", "qemu:allocation-depth")
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Go(""); err != nil {
			t.Fatal(err)
		}
		base, depth := ids["base:allocation"], ids["qemu:allocation-depth"]
		for _, q := range []struct {
			flags       uint16
			off, n      uint64
			base, depth []nbdtest.Status
		}{
			{0, 0, 16 * k, runs(3*k, 0, k, 3, k, 2, 11*k, 3), runs(2*k, 1, k, 3, k, 2, k, 1, 11*k, 0)},
			{nbdtest.ReqOne, 0, 16 * k, runs(3*k, 0), runs(2*k, 1)},
			{nbdtest.ReqOne, k / 2, k, runs(k, 0), runs(k, 1)},
			{0, 16*k - 1, 1, runs(1, 3), runs(1, 0)},
		} {
			r := do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus, Flags: q.flags, Off: q.off, Length: q.n}, 0)
			want := map[uint32][]nbdtest.Status{base: q.base, depth: q.depth}
			if !reflect.DeepEqual(r.Status, want) {
				t.Errorf("%s: status of %d+%d with flags %d: %v, want %v", m, q.off, q.n, q.flags, r.Status, want)
			}
		}
		do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus}, 22)
		do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus, Off: 16 * k, Length: 1}, 22)
		do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus, Off: 1<<64 - 1, Length: 2}, 22)
		do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus, Length: 1, Flags: nbdtest.DF}, 22)
	}
}

// TestBlockStatusLimit asks for more runs than a reply may hold, and for those of contexts that fail.
func TestBlockStatusLimit(t *testing.T) {
	const disk = 1 << 31
	alternate := func(ctx context.Context, off, n int64, fn func(int64, uint32) bool) error {
		for end := off + n; off < end; off += 512 {
			if !fn(512, uint32(off/512%2)) {
				return nil
			}
		}
		return nil
	}
	fail := func(ctx context.Context, off, n int64, fn func(int64, uint32) bool) error {
		return fmt.Errorf("no luck")
	}
	silent := func(ctx context.Context, off, n int64, fn func(int64, uint32) bool) error { return nil }
	wrong := func(ctx context.Context, off, n int64, fn func(int64, uint32) bool) error {
		for _, l := range []int64{-5, 0, 1 << 62, 1 << 62} {
			fn(l, 9)
		}
		return nil
	}
	s := start(t, nbd.Options{}, nbd.Export{Device: sized{nbdtest.NewDevice(0), disk}, Contexts: []nbd.Context{
		{Name: "t:alternate", BlockStatus: alternate}, {Name: "t:fail", BlockStatus: fail},
		{Name: "t:silent", BlockStatus: silent}, {Name: "t:wrong", BlockStatus: wrong},
	}})
	status := func(name string, want uint32) []nbdtest.Status {
		c := s.dial()
		if err := c.WantStructured(); err != nil {
			t.Fatal(err)
		}
		ids, err := c.Meta(nbdtest.OptSetMeta, "", name)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Go(""); err != nil {
			t.Fatal(err)
		}
		return do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus, Length: disk - 512}, want).Status[ids[name]]
	}
	if got := len(status("t:alternate", 0)); got != 131072 {
		t.Errorf("%d runs, want 131072", got)
	}
	status("t:fail", 5)
	status("t:silent", 5)
	if got := status("t:wrong", 0); !reflect.DeepEqual(got, []nbdtest.Status{{Length: disk - 512, State: 9}}) {
		t.Errorf("runs of nonsense lengths: %v", got)
	}
}

// sized is a device that claims another size.
type sized struct {
	block.Device
	size int64
}

func (d sized) Size() int64 { return d.size }

// TestAdvertised tells clients less, where an export says so.
func TestAdvertised(t *testing.T) {
	noLeaks(t)
	dev := nbdtest.NewDevice(1 << 20)
	dev.DeviceInfo.PreferAlign = 64 << 10
	s := start(t, nbd.Options{}, nbd.Export{Device: dev, Advertised: nbd.Advertised{
		NoDepth: true, NoMultiConn: true, PreferBlock: 4096, MinBlock: 512,
	}})
	c := s.dial()
	if err := c.Info(""); err != nil {
		t.Fatal(err)
	}
	if c.TxFlags&(1<<8) != 0 {
		t.Errorf("flags %#x promise several connections", c.TxFlags)
	}
	if want := [3]uint32{512, 4096, 32 << 20}; c.BlockSizes != want {
		t.Errorf("block sizes %v, want %v", c.BlockSizes, want)
	}
	if err := c.WantStructured(); err != nil {
		t.Fatal(err)
	}
	got, err := c.Meta(nbdtest.OptListMeta, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := got["base:allocation"]; !ok || len(got) != 1 {
		t.Errorf("contexts %v, want base:allocation only", got)
	}
	for _, o := range []nbd.Advertised{{PreferBlock: 3}, {MinBlock: 8192, PreferBlock: 4096}, {MaxBlock: 64 << 20}, {MaxBlock: 6000}} {
		if err := s.AddExport(nbd.Export{Name: "x", Device: dev, Advertised: o}); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}
