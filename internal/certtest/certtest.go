// Package certtest makes certificates for tests: an authority that lives in memory and folders laid out as QEMU and libnbd
// expect them.
package certtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// CA is a certificate authority.
type CA struct {
	t      testing.TB
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
}

// Names is what a certificate says about its owner.
type Names struct {
	CommonName string
	DNS        []string
	Expired    bool
	Server     bool // the certificate is for a server on localhost, not for a client
}

// NewCA makes an authority.
func NewCA(t testing.TB) *CA {
	t.Helper()
	ca := &CA{t: t, key: newKey(t), serial: 1}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	ca.cert = ca.sign(template, template, ca.key)
	return ca
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (ca *CA) sign(template, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	ca.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), ca.key)
	if err != nil {
		ca.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		ca.t.Fatal(err)
	}
	return cert
}

// Issue makes a certificate with its key.
func (ca *CA) Issue(n Names) tls.Certificate {
	ca.t.Helper()
	key := newKey(ca.t)
	ca.serial++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(ca.serial), Subject: pkix.Name{CommonName: n.CommonName}, DNSNames: n.DNS,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if n.Expired {
		template.NotAfter = time.Now().Add(-time.Hour)
	}
	if n.Server {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		template.DNSNames = append(template.DNSNames, "localhost")
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	}
	cert := ca.sign(template, ca.cert, key)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// Pool holds the authority alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// PEM returns the authority's certificate.
func (ca *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
}

// Revoke returns a list of certificates that do not count any more, valid until a day after issued.
func (ca *CA) Revoke(issued time.Time, certs ...tls.Certificate) []byte {
	ca.t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: issued, NextUpdate: issued.Add(24 * time.Hour)}
	for _, c := range certs {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: c.Leaf.SerialNumber, RevocationTime: issued})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, ca.cert, ca.key)
	if err != nil {
		ca.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// ServerDir makes a folder with the credentials of a server on localhost.
func (ca *CA) ServerDir() string {
	ca.t.Helper()
	return ca.dir("server", ca.Issue(Names{CommonName: "server", Server: true}))
}

// ClientDir makes a folder with the credentials of a client, without a certificate of its own if n is nil.
func (ca *CA) ClientDir(n *Names) string {
	ca.t.Helper()
	if n == nil {
		dir := ca.t.TempDir()
		Write(ca.t, dir, "ca-cert.pem", ca.PEM())
		return dir
	}
	return ca.dir("client", ca.Issue(*n))
}

func (ca *CA) dir(who string, cert tls.Certificate) string {
	ca.t.Helper()
	dir := ca.t.TempDir()
	Write(ca.t, dir, "ca-cert.pem", ca.PEM())
	WritePair(ca.t, dir, who, cert)
	return dir
}

// WritePair writes who-cert.pem and who-key.pem.
func WritePair(t testing.TB, dir, who string, cert tls.Certificate) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	Write(t, dir, who+"-cert.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}))
	Write(t, dir, who+"-key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
}

// Write writes a file that only its owner can read.
func Write(t testing.TB, dir, name string, p []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), p, 0o600); err != nil {
		t.Fatal(err)
	}
}
