package nbd_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/droverproject/drover/internal/certtest"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/nbd/internal/nbdtest"
)

// serverTLS is TLS with a certificate for localhost, and with a demand for client certificates if mutual.
func serverTLS(ca *certtest.CA, required, mutual bool) *nbd.TLS {
	config := &tls.Config{Certificates: []tls.Certificate{ca.Issue(certtest.Names{CommonName: "server", Server: true})}}
	if mutual {
		config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, ca.Pool()
	}
	return &nbd.TLS{Config: config, Required: required}
}

func clientTLS(ca *certtest.CA, certs ...tls.Certificate) *tls.Config {
	return &tls.Config{ServerName: "localhost", RootCAs: ca.Pool(), Certificates: certs}
}

// endings collects how connections end.
func endings(o nbd.Options) (nbd.Options, <-chan error) {
	ended := make(chan error, 100)
	o.Observer.Disconnected = func(_ nbd.Conn, _ nbd.Stats, err error) { ended <- err }
	return o, ended
}

func TestTLS(t *testing.T) {
	noLeaks(t)
	ca := certtest.NewCA(t)
	dev := nbdtest.NewDevice(16 << 20)
	s := start(t, nbd.Options{TLS: serverTLS(ca, true, false)}, nbd.Export{Device: dev},
		nbd.Export{Name: "slow", Device: nbdtest.Slow{Device: dev}})
	data := bytes.Repeat([]byte("encrypted "), 300_000)
	for _, export := range []string{"", "slow"} {
		for _, m := range modes {
			c := s.dial()
			if err := c.StartTLS(clientTLS(ca)); err != nil {
				t.Fatal(err)
			}
			refused(t, c, nbdtest.OptStartTLS, nil, nbdtest.RepErrInvalid)
			var err error
			switch m {
			case structured:
				err = c.WantStructured()
			case extended:
				err = c.WantExtended()
			}
			if err == nil {
				err = c.Go(export)
			}
			if err != nil {
				t.Fatal(err)
			}
			do(t, c, nbdtest.Request{Cmd: nbdtest.Write, Off: 7, Data: data}, 0)
			do(t, c, nbdtest.Request{Cmd: nbdtest.Flush}, 0)
			if r := do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Off: 7, Length: uint64(len(data))}, 0); !bytes.Equal(r.Data, data) {
				t.Errorf("%s: read other data than was written", m)
			}
			var list []nbdtest.Request
			for i := range 50 {
				list = append(list, nbdtest.Request{Cmd: nbdtest.Read, Off: uint64(i) * 4096, Length: 4096})
			}
			if _, err := c.Send(list...); err != nil {
				t.Fatal(err)
			}
			for range list {
				if r, err := c.Recv(); err != nil || r.Errno != 0 || len(r.Data) != 4096 {
					t.Fatalf("error %d, %d bytes, %v", r.Errno, len(r.Data), err)
				}
			}
			leave(t, c)
		}
	}
}

// leave says goodbye and hangs up. Whether the farewell of the encryption still finds the server there is a matter of luck.
func leave(t *testing.T, c *nbdtest.Client) {
	t.Helper()
	if _, err := c.Send(nbdtest.Request{Cmd: nbdtest.Disc}); err != nil {
		t.Error(err)
	}
	c.Conn.Close()
}

// TestTLSRequired has a client in plain text try everything.
func TestTLSRequired(t *testing.T) {
	noLeaks(t)
	ca := certtest.NewCA(t)
	o, ended := endings(nbd.Options{TLS: serverTLS(ca, true, false)})
	s := start(t, o, nbd.Export{Name: "secret", Device: nbdtest.NewDevice(512)})
	c := s.dial()
	for _, o := range []struct {
		opt  uint32
		data []byte
	}{
		{nbdtest.OptList, nil}, {nbdtest.OptInfo, nbdtest.GoData("secret")}, {nbdtest.OptGo, nbdtest.GoData("secret")},
		{nbdtest.OptStructuredReply, nil}, {nbdtest.OptExtendedHeaders, nil},
		{nbdtest.OptListMeta, nbdtest.MetaData("secret")}, {nbdtest.OptSetMeta, nbdtest.MetaData("secret", "base:allocation")},
		{77, []byte("what")},
	} {
		list, err := c.Option(o.opt, o.data)
		if err != nil || len(list) != 1 || list[0].Type != nbdtest.RepErrTLSReqd || bytes.Contains(list[0].Data, []byte("secret")) {
			t.Errorf("option %d in plain text: %+v, %v", o.opt, list, err)
		}
	}
	refused(t, c, nbdtest.OptStartTLS, []byte("x"), nbdtest.RepErrInvalid)
	if err := c.StartTLS(clientTLS(ca)); err != nil {
		t.Error(err)
	}
	if err := c.Go("secret"); err != nil {
		t.Error(err)
	}
	leave(t, c)
	if err := wait(t, ended, "the end of a good client"); err != nil {
		t.Error(err)
	}
	c = s.dial()
	if _, err := c.Must(nbdtest.OptAbort, nil); err != nil {
		t.Errorf("ABORT in plain text: %v", err)
	}
	if err := wait(t, ended, "the end after ABORT"); err != nil {
		t.Error(err)
	}
	if err := s.dial().ExportName("secret"); err == nil {
		t.Error("EXPORT_NAME in plain text was served")
	}
	if err := wait(t, ended, "the end after EXPORT_NAME"); !errors.Is(err, nbd.ErrTLS) {
		t.Errorf("EXPORT_NAME in plain text ended with %v", err)
	}
}

// TestTLSOptional has clients with and without encryption side by side. What was agreed on in plain text is void after
// STARTTLS.
func TestTLSOptional(t *testing.T) {
	noLeaks(t)
	ca := certtest.NewCA(t)
	s := start(t, nbd.Options{TLS: serverTLS(ca, false, false)}, nbd.Export{Device: nbdtest.NewDevice(4096)},
		nbd.Export{Name: "private", Device: nbdtest.NewDevice(4096), Allow: func(p nbd.Peer) bool { return p.Encrypted }})
	do(t, s.open(simple, ""), nbdtest.Request{Cmd: nbdtest.Read, Length: 1}, 0)
	c := s.dial()
	if err := c.WantStructured(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Meta(nbdtest.OptSetMeta, "", "base:allocation"); err != nil {
		t.Fatal(err)
	}
	refused(t, c, nbdtest.OptInfo, nbdtest.GoData("private"), nbdtest.RepErrUnknown)
	if err := c.StartTLS(clientTLS(ca)); err != nil {
		t.Fatal(err)
	}
	refused(t, c, nbdtest.OptSetMeta, nbdtest.MetaData("", "base:allocation"), nbdtest.RepErrInvalid)
	if err := c.WantStructured(); err != nil {
		t.Fatal(err)
	}
	if err := c.Go("private"); err != nil {
		t.Fatal(err)
	}
	do(t, c, nbdtest.Request{Cmd: nbdtest.BlockStatus, Length: 512}, 22) // the contexts are gone
}

// TestTLSInjection puts options in plain text behind STARTTLS, where somebody in between could put them. None may count.
func TestTLSInjection(t *testing.T) {
	noLeaks(t)
	ca := certtest.NewCA(t)
	for _, required := range []bool{true, false} {
		o, ended := endings(nbd.Options{TLS: serverTLS(ca, required, false)})
		dev := nbdtest.NewDevice(4096)
		s := start(t, o, nbd.Export{Device: dev})
		injected := append(optionBytes(nbdtest.OptList, nil), optionBytes(nbdtest.OptGo, nbdtest.GoData(""))...)
		startTLS := optionBytes(nbdtest.OptStartTLS, nil)

		// In one piece, the connection ends before anything is acknowledged.
		c := s.dial()
		if _, err := c.Conn.Write(append(startTLS, injected...)); err != nil {
			t.Fatal(err)
		}
		if p, err := io.ReadAll(c.Conn); err == nil && len(p) != 0 {
			t.Errorf("plain text behind STARTTLS was answered with %x", p)
		}
		if err := wait(t, ended, "the end of an injection"); !errors.Is(err, nbd.ErrProtocol) {
			t.Errorf("injection ended with %v", err)
		}
		// In two pieces, what follows the acknowledgement is no TLS.
		c = s.dial()
		if _, err := c.Must(nbdtest.OptStartTLS, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Conn.Write(injected); err != nil {
			t.Fatal(err)
		}
		p, err := io.ReadAll(c.Conn)
		if err == nil && bytes.Contains(p, []byte{0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9}) {
			t.Errorf("plain text after STARTTLS was answered with %x", p)
		}
		if err := wait(t, ended, "the end of a late injection"); !errors.Is(err, nbd.ErrTLS) {
			t.Errorf("late injection ended with %v", err)
		}
	}
}

// TestTLSClientCertificates demands certificates.
func TestTLSClientCertificates(t *testing.T) {
	noLeaks(t)
	ca, other := certtest.NewCA(t), certtest.NewCA(t)
	alice := ca.Issue(certtest.Names{CommonName: "alice", DNS: []string{"alice.example"}})
	o, ended := endings(nbd.Options{TLS: serverTLS(ca, true, true)})
	s := start(t, o, nbd.Export{Name: "hers", Device: nbdtest.NewDevice(512), Allow: func(p nbd.Peer) bool {
		return p.Encrypted && p.Certificate != nil && p.Certificate.Subject.CommonName == "alice" &&
			p.Certificate.VerifyHostname("alice.example") == nil
	}})
	for name, try := range map[string]struct {
		config  *tls.Config
		welcome bool
		sees    bool
	}{
		"alice":           {clientTLS(ca, alice), true, true},
		"bob":             {clientTLS(ca, ca.Issue(certtest.Names{CommonName: "bob"})), true, false},
		"nobody":          {clientTLS(ca), false, false},
		"alice elsewhere": {clientTLS(ca, other.Issue(certtest.Names{CommonName: "alice", DNS: []string{"alice.example"}})), false, false},
		"alice of old": {clientTLS(ca, ca.Issue(certtest.Names{CommonName: "alice", DNS: []string{"alice.example"},
			Expired: true})), false, false},
		"a server":             {clientTLS(ca, ca.Issue(certtest.Names{CommonName: "alice", Server: true})), false, false},
		"a distrustful client": {clientTLS(other, alice), false, false},
	} {
		c := s.dial()
		// With TLS 1.3 a client believes to be through before the server has looked at its certificate.
		err := c.StartTLS(try.config)
		var seen []nbdtest.OptionReply
		if err == nil {
			seen, err = c.Must(nbdtest.OptList, nil)
		}
		if (err == nil) != try.welcome || (len(seen) == 1) != try.sees {
			t.Errorf("%s: %v, sees %d exports", name, err, len(seen))
		}
		if try.welcome {
			if err := c.Go("hers"); (err == nil) != try.sees {
				t.Errorf("%s: GO: %v", name, err)
			}
		}
		c.Conn.Close()
		if err := wait(t, ended, "the end of "+name); !try.welcome && !errors.Is(err, nbd.ErrTLS) {
			t.Errorf("%s: connection ended with %v", name, err)
		}
	}
}

// TestTLSSilence has clients stop in the middle of the TLS handshake.
func TestTLSSilence(t *testing.T) {
	noLeaks(t)
	ca := certtest.NewCA(t)
	o, ended := endings(nbd.Options{TLS: serverTLS(ca, true, false), HandshakeTimeout: 500 * time.Millisecond})
	s := start(t, o, nbd.Export{Device: nbdtest.NewDevice(512)})
	c := s.dial()
	if _, err := c.Must(nbdtest.OptStartTLS, nil); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, ended, "the end of a silent client"); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("handshake ended with %v", err)
	}
}

// TestTLSShutdown shuts down while encrypted connections are idle, busy and in the middle of their handshake.
func TestTLSShutdown(t *testing.T) {
	noLeaks(t)
	ca := certtest.NewCA(t)
	dev := nbdtest.NewDevice(1 << 20)
	g := newGate(t, dev, all)
	s := start(t, nbd.Options{TLS: serverTLS(ca, true, false)}, nbd.Export{Device: nbdtest.Slow{Device: dev}})
	busy, idle, shaking := s.dial(), s.dial(), s.dial()
	for _, c := range []*nbdtest.Client{busy, idle} {
		if err := c.StartTLS(clientTLS(ca)); err != nil {
			t.Fatal(err)
		}
		if err := c.Go(""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := shaking.Must(nbdtest.OptStartTLS, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := busy.Send(nbdtest.Request{Cmd: nbdtest.Flush}); err != nil {
		t.Fatal(err)
	}
	wait(t, g.entered, "the flush")
	down := background(func() error { return s.Shutdown(t.Context()) })
	for _, c := range []*nbdtest.Client{idle, shaking} {
		// The encrypted one gets a proper farewell, without which this would fail.
		if _, err := io.ReadAll(c.Conn); err != nil {
			t.Errorf("idle connection: %v", err)
		}
	}
	g.release()
	if r, err := busy.Recv(); err != nil || r.Errno != 0 {
		t.Errorf("request under way: %+v, %v", r, err)
	}
	if err := wait(t, down, "the end of Shutdown"); err != nil {
		t.Error(err)
	}
}

// TestTLSListener serves connections that are encrypted from their first byte.
func TestTLSListener(t *testing.T) {
	noLeaks(t)
	ca := certtest.NewCA(t)
	setup := serverTLS(ca, true, true)
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	s := startOn(t, tls.NewListener(l, setup.Config), nbd.Options{TLS: setup}, nbd.Export{
		Device: nbdtest.NewDevice(4096), Allow: func(p nbd.Peer) bool { return p.Certificate != nil },
	})
	nc, err := tls.Dial("unix", l.Addr().String(), clientTLS(ca, ca.Issue(certtest.Names{CommonName: "x"})))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c, err := nbdtest.NewClient(nc)
	if err == nil {
		err = c.Go("")
	}
	if err != nil {
		t.Fatal(err)
	}
	do(t, c, nbdtest.Request{Cmd: nbdtest.Read, Length: 512}, 0)
	s.stop()
}

// TestInteropTLS has the tools of others come with and without the right credentials.
func TestInteropTLS(t *testing.T) {
	noLeaks(t)
	ca, other := certtest.NewCA(t), certtest.NewCA(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("no TCP here: %v", err)
	}
	dev := filled(16 << 20)
	s := startOn(t, l, nbd.Options{TLS: serverTLS(ca, true, true)}, nbd.Export{Name: "disk", Device: dev})
	_, port, err := net.SplitHostPort(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	good := ca.ClientDir(&certtest.Names{CommonName: "tool"})
	libnbd := func(dir string) string { return "nbds://localhost:" + port + "/disk?tls-certificates=" + dir }
	qemu := func(dir string) []string {
		return []string{"--object", "tls-creds-x509,id=t,endpoint=client,dir=" + dir, "--image-opts",
			"driver=nbd,server.type=inet,server.host=localhost,server.port=" + port + ",export=disk,tls-creds=t"}
	}
	if out := tool(t, "nbdinfo", "--size", libnbd(good)); strings.TrimSpace(out) != "16777216" {
		t.Errorf("nbdinfo --size says %s", out)
	}
	copied := t.TempDir() + "/copy"
	tool(t, "nbdcopy", libnbd(good), copied)
	if got, err := os.ReadFile(copied); err != nil || !bytes.Equal(got, dev.Bytes(0, 16<<20)) {
		t.Errorf("nbdcopy: other data (%v)", err)
	}
	tool(t, "qemu-img", append([]string{"info"}, qemu(good)...)...)
	tool(t, "qemu-io", append(qemu(good), "-c", "write -P 5 0 8M", "-c", "read -P 5 0 8M", "-c", "flush")...)
	for name, dir := range map[string]string{
		"no certificate":      ca.ClientDir(nil),
		"another authority's": mixed(t, ca, other),
		"an expired one":      ca.ClientDir(&certtest.Names{CommonName: "tool", Expired: true}),
	} {
		if out, ok := failing(t, "nbdinfo", libnbd(dir)); ok {
			t.Errorf("nbdinfo with %s was served: %s", name, out)
		}
		if out, ok := failing(t, "qemu-img", append([]string{"info"}, qemu(dir)...)...); ok {
			t.Errorf("qemu-img with %s was served: %s", name, out)
		}
	}
	if out, ok := failing(t, "nbdinfo", "nbd://localhost:"+port+"/disk"); ok {
		t.Errorf("nbdinfo in plain text was served: %s", out)
	}
	if out, ok := failing(t, "qemu-img", "info", "nbd://localhost:"+port+"/disk"); ok {
		t.Errorf("qemu-img in plain text was served: %s", out)
	}
}

// mixed is a folder with a certificate of one authority whose owner trusts servers of another.
func mixed(t *testing.T, trusted, own *certtest.CA) string {
	dir := own.ClientDir(&certtest.Names{CommonName: "tool"})
	certtest.Write(t, dir, "ca-cert.pem", trusted.PEM())
	return dir
}
