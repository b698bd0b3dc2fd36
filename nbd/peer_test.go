package nbd_test

import (
	"strings"
	"testing"

	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

func never(nbd.Peer) bool { return false }

// TestAllow has exports that do not exist for a client.
func TestAllow(t *testing.T) {
	noLeaks(t)
	s := start(t, nbd.Options{DefaultExport: "open"},
		nbd.Export{Name: "", Device: nbdtest.NewDevice(512), Allow: never},
		nbd.Export{Name: "closed", Device: nbdtest.NewDevice(1024), Allow: never},
		nbd.Export{Name: "open", Device: nbdtest.NewDevice(2048), Allow: func(p nbd.Peer) bool { return p.Network == "unix" }})
	c := s.dial()
	list, err := c.Must(nbdtest.OptList, nil)
	if err != nil || len(list) != 1 || !strings.HasSuffix(string(list[0].Data), "open") {
		t.Errorf("LIST says %+v, %v", list, err)
	}
	// Whatever the server says about the export, it says about one that is not there.
	for _, opt := range []uint32{nbdtest.OptInfo, nbdtest.OptGo} {
		a, b := replies(t, c, opt, nbdtest.GoData("closed")), replies(t, c, opt, nbdtest.GoData("nosuch"))
		if a != b || !strings.Contains(a, "80000006") {
			t.Errorf("option %d: %s for a closed export, %s for none", opt, a, b)
		}
	}
	if err := c.WantStructured(); err != nil {
		t.Fatal(err)
	}
	for _, opt := range []uint32{nbdtest.OptListMeta, nbdtest.OptSetMeta} {
		a, b := replies(t, c, opt, nbdtest.MetaData("closed", "base:allocation")),
			replies(t, c, opt, nbdtest.MetaData("nosuch", "base:allocation"))
		if a != b {
			t.Errorf("option %d: %s for a closed export, %s for none", opt, a, b)
		}
	}
	if err := s.dial().ExportName("closed"); err == nil {
		t.Error("EXPORT_NAME of a closed export was served")
	}
	// The empty name stands for the default export, since the one of that name is not there for this client.
	if err := c.Go(""); err != nil || c.Size != 2048 {
		t.Errorf("GO: %v, %d bytes", err, c.Size)
	}
}

// replies asks for an option and returns the answers as text.
func replies(t *testing.T, c *nbdtest.Client, opt uint32, data []byte) string {
	t.Helper()
	list, err := c.Option(opt, data)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, r := range list {
		text.WriteString(strings.Join([]string{hex(r.Type), string(r.Data)}, " "))
	}
	return text.String()
}

func hex(n uint32) string {
	const digits = "0123456789abcdef"
	var p [8]byte
	for i := range p {
		p[i] = digits[n>>(28-4*i)&15]
	}
	return string(p[:])
}
