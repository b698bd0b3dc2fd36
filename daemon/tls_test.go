package daemon

import (
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/droverproject/drover/internal/certtest"
)

// TestLoadTLSErrors has folders that would not do. Each is refused with the file's name and what is wrong.
func TestLoadTLSErrors(t *testing.T) {
	ca := certtest.NewCA(t)
	for name, tc := range map[string]struct {
		spoil func(dir string)
		want  string
	}{
		"no certificate": {func(dir string) { remove(t, dir, serverCertFile) }, "server-cert.pem is missing"},
		"no key":         {func(dir string) { remove(t, dir, serverKeyFile) }, "server-key.pem is missing"},
		"no authority":   {func(dir string) { remove(t, dir, caCertFile) }, "ca-cert.pem is missing"},
		"key of another": {func(dir string) {
			cert, err := os.ReadFile(filepath.Join(dir, serverCertFile))
			if err != nil {
				t.Fatal(err)
			}
			certtest.WritePair(t, dir, "server", ca.Issue(certtest.Names{CommonName: "other", Server: true}))
			certtest.Write(t, dir, serverCertFile, cert)
		}, "server-key.pem with server-cert.pem: tls: private key does not match public key"},
		"expired": {func(dir string) {
			certtest.WritePair(t, dir, "server", ca.Issue(certtest.Names{CommonName: "old", Server: true, Expired: true}))
		}, "server-cert.pem: the certificate has expired on "},
		"of a client": {func(dir string) {
			certtest.WritePair(t, dir, "server", ca.Issue(certtest.Names{CommonName: "client"}))
		}, "server-cert.pem: the certificate is not meant for a server"},
		"no PEM":   {func(dir string) { certtest.Write(t, dir, serverCertFile, []byte("x")) }, "server-cert.pem: no certificate in PEM form"},
		"a folder": {func(dir string) { remove(t, dir, caCertFile); mkdir(t, dir, caCertFile) }, "ca-cert.pem is not a regular file"},
		"no CA":    {func(dir string) { copyFile(t, dir, serverCertFile, caCertFile) }, "is not that of a certificate authority"},
		"bad list": {func(dir string) { certtest.Write(t, dir, caRevokedFile, []byte("x")) }, "ca-crl.pem: no revocation list"},
		"alien list": {func(dir string) { certtest.Write(t, dir, caRevokedFile, certtest.NewCA(t).Revoke(time.Now())) },
			"is signed by none of the authorities"},
		"old list": {func(dir string) { certtest.Write(t, dir, caRevokedFile, ca.Revoke(time.Now().Add(-48*time.Hour))) },
			"ca-crl.pem: the list has expired on "},
	} {
		dir := ca.ServerDir()
		if _, err := LoadTLS(dir, true); err != nil {
			t.Fatal(err)
		}
		tc.spoil(dir)
		if _, err := LoadTLS(dir, true); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q in it", name, err, tc.want)
		}
	}
	dir := ca.ServerDir()
	remove(t, dir, caCertFile)
	if c, err := LoadTLS(dir, false); err != nil || c.ClientAuth != tls.NoClientCert {
		t.Errorf("without verification of clients: %v", err)
	}
}

func remove(t *testing.T, dir, name string) {
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, dir, name string) {
	if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, dir, from, to string) {
	p, err := os.ReadFile(filepath.Join(dir, from))
	if err != nil {
		t.Fatal(err)
	}
	certtest.Write(t, dir, to, p)
}

// TestLoadTLSClients shakes hands with clients of all kinds.
func TestLoadTLSClients(t *testing.T) {
	ca := certtest.NewCA(t)
	good, lost := ca.Issue(certtest.Names{CommonName: "good"}), ca.Issue(certtest.Names{CommonName: "lost"})
	dir := ca.ServerDir()
	certtest.Write(t, dir, caRevokedFile, ca.Revoke(time.Now().Add(-time.Hour), lost))
	config, err := LoadTLS(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		certs []tls.Certificate
		max   uint16
		want  string
	}{
		"good":     {[]tls.Certificate{good}, 0, ""},
		"good 1.2": {[]tls.Certificate{good}, tls.VersionTLS12, ""},
		"old TLS":  {[]tls.Certificate{good}, tls.VersionTLS11, "version"},
		"none":     {nil, 0, "didn't provide a certificate"},
		"alien":    {[]tls.Certificate{certtest.NewCA(t).Issue(certtest.Names{CommonName: "good"})}, 0, "unknown authority"},
		"revoked":  {[]tls.Certificate{lost}, 0, "revoked"},
	} {
		ours, theirs := net.Pipe()
		go func() {
			c := tls.Client(ours, &tls.Config{
				ServerName: "localhost", RootCAs: ca.Pool(), Certificates: tc.certs, MaxVersion: tc.max, MinVersion: tls.VersionTLS10,
			})
			_ = c.Handshake() // the server's view is what counts
			_, _ = c.Read(make([]byte, 1))
		}()
		err := tls.Server(theirs, config).Handshake()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
		ours.Close()
		theirs.Close()
	}
}
