package daemon

import (
	"crypto/tls"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/droverproject/drover/internal/certtest"
)

// shake lets a client with a certificate shake hands with a server and returns the serial number of the server's
// certificate.
func shake(t *testing.T, ca *certtest.CA, config *tls.Config, cert tls.Certificate) (serial string, err error) {
	t.Helper()
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	seen := make(chan string, 1)
	go func() {
		c := tls.Client(ours, &tls.Config{ServerName: "localhost", RootCAs: ca.Pool(), Certificates: []tls.Certificate{cert}})
		if c.Handshake() == nil {
			seen <- c.ConnectionState().PeerCertificates[0].SerialNumber.String()
		} else {
			seen <- ""
		}
		_, _ = c.Read(make([]byte, 1))
	}()
	err = tls.Server(theirs, config).Handshake()
	if err != nil {
		return "", err
	}
	return <-seen, nil
}

// TestCredentialsReload renews a server's certificate and revokes a client's while the server runs.
func TestCredentialsReload(t *testing.T) {
	ca := certtest.NewCA(t)
	client := ca.Issue(certtest.Names{CommonName: "client"})
	dir := ca.ServerDir()
	creds, err := LoadCredentials(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	config := creds.Config()
	first, err := shake(t, ca, config, client)
	if err != nil || first == "" {
		t.Fatalf("%q %v", first, err)
	}
	if changes, err := creds.Reload(); err != nil || len(changes) != 0 {
		t.Errorf("nothing has changed: %q %v", changes, err)
	}

	certtest.WritePair(t, dir, "server", ca.Issue(certtest.Names{CommonName: "localhost", Server: true, DNS: []string{"localhost"}}))
	changes, err := creds.Reload()
	if err != nil || len(changes) != 2 || !strings.Contains(changes[0], "valid until") || !strings.Contains(changes[1], serverKeyFile) {
		t.Errorf("renewed: %q %v", changes, err)
	}
	if again, err := shake(t, ca, config, client); err != nil || again == first {
		t.Errorf("the old certificate is in use (%v)", err)
	}

	certtest.Write(t, dir, caRevokedFile, ca.Revoke(time.Now(), client))
	if changes, err := creds.Reload(); err != nil || len(changes) != 1 || !strings.Contains(changes[0], caRevokedFile) {
		t.Errorf("revoked: %q %v", changes, err)
	}
	if _, err := shake(t, ca, config, client); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("a client whose certificate is revoked: %v", err)
	}

	// What is wrong changes nothing.
	remove(t, dir, serverKeyFile)
	if _, err := creds.Reload(); err == nil {
		t.Error("a folder without a key was read")
	}
	if _, err := shake(t, ca, config, ca.Issue(certtest.Names{CommonName: "other"})); err != nil {
		t.Errorf("after a reload that failed: %v", err)
	}
}
