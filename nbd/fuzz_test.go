package nbd_test

import (
	"context"
	"io"
	"net"
	"testing"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/internal/certtest"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// The streams are long, and making an interesting one shorter takes the fuzzer minutes by default: run it with
// -fuzzminimizetime=10x.

// feed lets a server read stream and nothing else. The server must come to an end, whatever it thinks of it.
func feed(t *testing.T, stream []byte) { feedTo(t, nbd.Options{}, stream) }

func feedTo(t *testing.T, o nbd.Options, stream []byte) {
	o.MaxMemory, o.MaxInflight, o.MaxRequest = 1<<20, 4, 256<<10
	dev := nbdtest.NewDevice(1 << 20)
	dev.TryErr = func(write bool, off, n int64) error {
		if off%3 == 0 {
			return block.ErrWouldBlock
		}
		return nil
	}
	s := nbd.NewServer(o)
	if err := s.AddExport(nbd.Export{Name: "", Device: dev}); err != nil {
		t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	served := background(func() error { return s.ServeConn(context.Background(), theirs) })
	drained := background(func() error { _, err := io.Copy(io.Discard, ours); return err })
	// The server may hang up in the middle, which is its good right.
	_, _ = ours.Write(stream)
	ours.Close()
	_ = wait(t, served, "the end of ServeConn") // any error will do
	_ = wait(t, drained, "the end of the replies")
	if err := s.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
}

// optionBytes is an option as it goes over the wire.
func optionBytes(opt byte, data []byte) []byte {
	p := append([]byte("IHAVEOPT\x00\x00\x00"), opt, 0, 0, byte(len(data)>>8), byte(len(data)))
	return append(p, data...)
}

const clientFlags = "\x00\x00\x00\x03"

func FuzzHandshake(f *testing.F) {
	for _, list := range [][][]byte{
		{optionBytes(nbdtest.OptList, nil), optionBytes(nbdtest.OptAbort, nil)},
		{optionBytes(nbdtest.OptExportName, nil)},
		{optionBytes(nbdtest.OptStartTLS, nil), optionBytes(nbdtest.OptInfo, nbdtest.GoData("", 0, 1, 2, 3, 9))},
		{optionBytes(nbdtest.OptStructuredReply, nil), optionBytes(nbdtest.OptListMeta, nbdtest.MetaData("", "qemu:")),
			optionBytes(nbdtest.OptSetMeta, nbdtest.MetaData("", "base:allocation")),
			optionBytes(nbdtest.OptGo, nbdtest.GoData(""))},
		{optionBytes(nbdtest.OptExtendedHeaders, nil), optionBytes(nbdtest.OptStructuredReply, nil),
			optionBytes(nbdtest.OptGo, nbdtest.GoData("nosuch", 3))},
	} {
		p := []byte(clientFlags)
		for _, o := range list {
			p = append(p, o...)
		}
		f.Add(p)
	}
	f.Fuzz(feed)
}

// FuzzStartTLS is FuzzHandshake with a server that can encrypt, or insists on it.
func FuzzStartTLS(f *testing.F) {
	ca := certtest.NewCA(f)
	may, must := serverTLS(ca, false, false), serverTLS(ca, true, true)
	hello := []byte("\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03")
	for _, list := range [][][]byte{
		{optionBytes(nbdtest.OptStartTLS, nil), hello}, {optionBytes(nbdtest.OptStartTLS, []byte("x")), optionBytes(nbdtest.OptList, nil)},
		{optionBytes(nbdtest.OptStructuredReply, nil), optionBytes(nbdtest.OptStartTLS, nil)},
		{optionBytes(nbdtest.OptGo, nbdtest.GoData("")), optionBytes(nbdtest.OptExportName, nil)},
	} {
		p := []byte(clientFlags)
		for _, o := range list {
			p = append(p, o...)
		}
		f.Add(false, p)
		f.Add(true, p)
	}
	f.Fuzz(func(t *testing.T, required bool, stream []byte) {
		if required {
			feedTo(t, nbd.Options{TLS: must}, stream)
		} else {
			feedTo(t, nbd.Options{TLS: may}, stream)
		}
	})
}

func FuzzTransmission(f *testing.F) {
	for mode := range byte(3) {
		c := nbdtest.Client{Extended: mode == 2}
		var p []byte
		for i, r := range []nbdtest.Request{
			{Cmd: nbdtest.Read, Length: 4096}, {Cmd: nbdtest.Read, Off: 1, Length: 100_000},
			{Cmd: nbdtest.Write, Length: 5, Data: []byte("hello")}, {Cmd: nbdtest.Flush, Flags: nbdtest.FUA},
			{Cmd: nbdtest.Write, Off: 9, Length: 70_000, Data: make([]byte, 70_000)}, {Cmd: nbdtest.Trim, Length: 1 << 20},
			{Cmd: nbdtest.WriteZeroes, Off: 512, Length: 4096, Flags: nbdtest.NoHole | nbdtest.FastZero},
			{Cmd: nbdtest.BlockStatus, Length: 1 << 20}, {Cmd: nbdtest.Cache, Length: 1 << 20}, {Cmd: 77},
			{Cmd: nbdtest.Write, Length: 300_000, Data: make([]byte, 300_000)}, {Cmd: nbdtest.Disc},
		} {
			r.Cookie = uint64(i)
			one := c.Encode(nil, r)
			f.Add(mode, one)
			p = append(p, one...)
		}
		f.Add(mode, p)
	}
	f.Fuzz(func(t *testing.T, mode byte, requests []byte) {
		p := []byte(clientFlags)
		switch mode % 3 {
		case 1:
			p = append(p, optionBytes(nbdtest.OptStructuredReply, nil)...)
		case 2:
			p = append(p, optionBytes(nbdtest.OptExtendedHeaders, nil)...)
		}
		if mode%3 != 0 {
			p = append(p, optionBytes(nbdtest.OptSetMeta, nbdtest.MetaData("", "base:allocation", "qemu:allocation-depth"))...)
		}
		p = append(p, optionBytes(nbdtest.OptGo, nbdtest.GoData(""))...)
		feed(t, append(p, requests...))
	})
}
