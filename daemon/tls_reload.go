package daemon

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// Credentials are those that LoadTLS reads, and can be read again when they have been renewed. Connections keep what they
// were made with.
type Credentials struct {
	dir        string
	verifyPeer bool
	current    atomic.Pointer[tls.Config]

	mu    sync.Mutex
	files map[string][]byte // as they were read last; nil for what was not there
}

// LoadCredentials reads a folder as LoadTLS does.
func LoadCredentials(dir string, verifyPeer bool) (*Credentials, error) {
	c := &Credentials{dir: dir, verifyPeer: verifyPeer}
	if _, err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Config is the configuration of a server. Each new connection gets what was read last.
func (c *Credentials) Config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.current.Load(), nil },
	}
}

// credentialFiles are the files that matter.
func (c *Credentials) credentialFiles() []string {
	if !c.verifyPeer {
		return []string{serverCertFile, serverKeyFile}
	}
	return []string{serverCertFile, serverKeyFile, caCertFile, caRevokedFile}
}

// Reload reads the folder again. If anything is wrong with it everything stays as it was; otherwise it returns what has
// changed, a sentence for each file.
func (c *Credentials) Reload() (changes []string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	files := make(map[string][]byte)
	for _, name := range c.credentialFiles() {
		b, err := os.ReadFile(filepath.Join(c.dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("TLS credentials in %q: %w", c.dir, err)
		}
		files[name] = b
	}
	config, err := LoadTLS(c.dir, c.verifyPeer)
	if err != nil {
		return nil, err
	}
	config.DynamicRecordSizingDisabled = true // as nbd has it, whose configuration this one stands in for
	for _, name := range c.credentialFiles() {
		if c.files != nil && !bytes.Equal(c.files[name], files[name]) {
			changes = append(changes, describeCredential(c.dir, name, files[name], config))
		}
	}
	c.files = files
	c.current.Store(config)
	return changes, nil
}

// describeCredential says what a file that has changed brings. A key is only said to be another.
func describeCredential(dir, name string, content []byte, config *tls.Config) string {
	path := filepath.Join(dir, name)
	switch {
	case content == nil:
		return path + ": gone"
	case name == serverCertFile:
		leaf, err := x509.ParseCertificate(config.Certificates[0].Certificate[0])
		if err == nil {
			return fmt.Sprintf("%s: certificate of %q, valid until %s", path, leaf.Subject, leaf.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return path + ": read anew"
}
