//go:build unix

package qemunbd

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/droverproject/drover/internal/certtest"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// TestTLS lets in whom the objects name, over TLS only, and lists over TLS.
func TestTLS(t *testing.T) {
	programs := both(t)
	dir := t.TempDir()
	images(t, dir)
	ca, other := certtest.NewCA(t), certtest.NewCA(t)
	serverDir := ca.ServerDir()
	clients := map[string]string{
		"alice":    ca.ClientDir(&certtest.Names{CommonName: "alice"}),
		"bob":      ca.ClientDir(&certtest.Names{CommonName: "bob"}),
		"nobody":   ca.ClientDir(nil),
		"stranger": other.ClientDir(&certtest.Names{CommonName: "alice"}),
	}
	rules := filepath.Join(dir, "rules.json")
	harness.OK(t, os.WriteFile(rules, []byte(`{"policy":"deny","rules":[{"match":"CN=al*","policy":"allow","format":"glob"}]}`), 0o600))
	creds := "tls-creds-x509,id=tls,endpoint=server,dir=" + serverDir
	for _, c := range []struct {
		args []string
		in   string // who gets in, in alphabetical order
	}{
		{[]string{"--object", creds, "--tls-creds", "tls"}, "alice bob"},
		{[]string{"--object", creds + ",verify-peer=no", "--tls-creds", "tls"}, "alice bob nobody"},
		{[]string{"--object", creds, "--object", "authz-simple,id=who,identity=CN=alice", "--tls-creds", "tls", "--tls-authz", "who"}, "alice"},
		{[]string{"--object", creds, "--tls-creds", "tls", "--tls-authz", "who",
			"--object", `{"qom-type":"authz-list","id":"who","policy":"allow","rules":[{"match":"CN=alice","policy":"deny"}]}`}, "bob"},
		{[]string{"--object", creds, "--tls-creds", "tls", "--tls-authz", "who",
			"--object", "authz-list,id=who,policy=deny,rules.0.match=CN=b?b,rules.0.policy=allow,rules.0.format=glob"}, "bob"},
		{[]string{"--object", creds, "--tls-creds", "tls", "--tls-authz", "who", "--object", "authz-listfile,id=who,filename=" + rules}, "alice"},
	} {
		t.Run(strings.ReplaceAll(fmt.Sprint(c.args[4:]), "/", "|"), func(t *testing.T) {
			for _, p := range programs {
				if p.name == "stock" && strings.Contains(fmt.Sprint(c.args), "authz-listfile") {
					continue // it knows the object by one name and not by the same one
				}
				args := append([]string{"-t", "-r", "-f", "raw", "-e", "0"}, append(c.args, "disk.raw")...)
				s := p.start(t, dir, args...)
				var in []string
				for _, name := range []string{"alice", "bob", "nobody", "stranger"} {
					if clientOf(t, s, clients[name]).Code == 0 {
						in = append(in, name)
					}
				}
				// The authority of a stranger's folder is not the server's either; without verification stock's client turns away.
				if got := strings.Join(in, " "); got != c.in {
					t.Errorf("%s lets in %q, want %q", p.name, got, c.in)
				}
				if r := harness.Run(t, "nbdinfo", "--size", s.uri("")); r.Code == 0 {
					t.Errorf("%s: plain text is let in", p.name)
				}
				if end := s.stop(); end.code != 0 {
					t.Errorf("%s ends with %+v", p.name, end)
				}
			}
		})
	}
}

// clientOf asks a server for its exports with the credentials of a folder, by stock.
func clientOf(t *testing.T, s *server, dir string) harness.Result {
	t.Helper()
	return harness.Run(t, "qemu-img", "info", "--object", "tls-creds-x509,id=c,endpoint=client,dir="+dir,
		"--image-opts", "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path="+s.socket+
			",file.tls-creds=c,file.tls-hostname=localhost")
}

// TestListTLS compares what the two list over TLS, and whom they take for the server.
func TestListTLS(t *testing.T) {
	programs := both(t)
	dir := t.TempDir()
	images(t, dir)
	ca := certtest.NewCA(t)
	s := programs[0].start(t, dir, "-t", "-f", "raw", "-e", "0", "--object", "tls-creds-x509,id=tls,endpoint=server,dir="+ca.ServerDir(),
		"--tls-creds", "tls", "disk.raw")
	object := "tls-creds-x509,id=tls,endpoint=client,dir=" + ca.ClientDir(&certtest.Names{CommonName: "alice"})
	list := func(p program, more ...string) outcome {
		return p.run(t, dir, append([]string{"--list", "-k", s.socket, "--object", object}, more...)...)
	}
	want, got := list(programs[0], "--tls-creds", "tls", "--tls-hostname", "localhost"), list(programs[1], "--tls-creds", "tls", "--tls-hostname", "localhost")
	if want != got || want.code != 0 {
		t.Errorf("stock %+v\nours  %+v", want, got)
	}
	for _, more := range [][]string{{"--tls-creds", "tls", "--tls-hostname", "elsewhere"}, nil} {
		for _, p := range programs {
			if r := list(p, more...); r.code != 1 || r.stdout != "" {
				t.Errorf("%s %q: %+v", p.name, more, r)
			}
		}
	}
	// Each serves what it finds there, by the same credentials.
	source := "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=" + s.socket + ",file.tls-creds=tls,file.tls-hostname=localhost"
	var seen []string
	for _, p := range programs {
		again := p.serve(t, dir, "-t", "-r", "--object", object, "--image-opts", source)
		harness.Must(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", again.uri(""), filepath.Join(dir, "disk.raw"))
		seen = append(seen, again.info(""))
		again.stop()
	}
	if seen[0] != seen[1] {
		t.Errorf("stock %s\nours  %s", seen[0], seen[1])
	}
	s.stop()
}

// TestClients has other programs copy to and from a server of ours.
func TestClients(t *testing.T) {
	both(t)
	peer.Need(t, "nbdcopy")
	dir := t.TempDir()
	images(t, dir)
	s := program{"ours", ours(t)}.serve(t, dir, "-t", "-e", "0", "-f", "qcow2", "--discard=unmap", "--detect-zeroes=unmap", "disk.qcow2")
	before := filepath.Join(dir, "before.raw")
	harness.Must(t, "nbdcopy", "--connections=4", s.uri(""), before)
	harness.Must(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", before, s.uri(""))
	content := bytes.Repeat([]byte("0123456789abcdef"), 8<<20/16)
	clear(content[1<<20 : 5<<20])
	in := filepath.Join(dir, "in.raw")
	harness.OK(t, os.WriteFile(in, content, 0o600))
	harness.Must(t, "nbdcopy", "--connections=4", "--flush", in, s.uri(""))
	harness.Must(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", in, s.uri(""))
	s.stop()
	image := filepath.Join(dir, "disk.qcow2")
	harness.Must(t, "qemu-img", "check", "-q", "-f", "qcow2", image)
	harness.Must(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", in, image)
	for _, span := range harness.ParseMap(t, harness.Must(t, "qemu-img", "map", "-f", "qcow2", "--output=json", image)) {
		if span.Data && span.Start < 5<<20 && span.Start+span.Length > 1<<20 {
			t.Errorf("the zeroes that were written have data: %v", span)
		}
	}
}
