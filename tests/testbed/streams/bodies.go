// Bodies in Kubernetes' protobuf, as its own codecs write them: the masks in agent/src/recording must find each secret in them.
package main

import (
	"bytes"
	"encoding/json"
	"os"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/scheme"
	restwatch "k8s.io/client-go/rest/watch"
)

const (
	canary      = "canary-hunter2"
	protobuf    = "application/vnd.kubernetes.protobuf"
	lastApplied = "kubectl.kubernetes.io/last-applied-configuration"
)

// One body.
type body struct {
	Name string `json:"name"`
	// Its path, as far as masks care.
	Path  string `json:"path"`
	Watch bool   `json:"watch,omitempty"`
	Body  []byte `json:"body"`
}

func meta(name string) metav1.ObjectMeta {
	applied, err := json.Marshal(map[string]any{"kind": "Secret", "stringData": map[string]string{"a": canary}})
	check(err)
	return metav1.ObjectMeta{
		Name: name, Namespace: "ns", ResourceVersion: "7", UID: "u", Generation: 3,
		Labels:      map[string]string{"app": "shown"},
		Annotations: map[string]string{"note": "shown", lastApplied: string(applied)},
		ManagedFields: []metav1.ManagedFieldsEntry{{
			Manager: "kubectl", Operation: "Apply", FieldsType: "FieldsV1", FieldsV1: &metav1.FieldsV1{Raw: []byte(`{"f:data":{"f:a":{}}}`)},
		}},
	}
}

func secret(name string) *corev1.Secret {
	immutable := true
	return &corev1.Secret{
		ObjectMeta: meta(name), Type: "Opaque", Immutable: &immutable,
		Data: map[string][]byte{"a": []byte(canary), "empty": {}}, StringData: map[string]string{"b": canary},
	}
}

func configMap(name string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "ns"},
		Data:       map[string]string{"a": "kind: Secret, shown"}, BinaryData: map[string][]byte{"b": []byte("shown")},
	}
}

func serializer() runtime.SerializerInfo {
	info, ok := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), protobuf)
	if !ok {
		panic("no protobuf")
	}
	return info
}

// In the version that the object's own type has.
func encoded(object runtime.Object) []byte {
	kinds, _, err := scheme.Scheme.ObjectKinds(object)
	check(err)
	encoder := scheme.Codecs.EncoderForVersion(serializer().Serializer, kinds[0].GroupVersion())
	data, err := runtime.Encode(encoder, object)
	check(err)
	return data
}

func events(objects ...runtime.Object) []byte {
	info, version := serializer(), schema.GroupVersion{Version: "v1"}
	var stream bytes.Buffer
	framed := info.StreamSerializer.Framer.NewFrameWriter(&stream)
	encoder := restwatch.NewEncoder(
		streaming.NewEncoder(framed, scheme.Codecs.EncoderForVersion(info.StreamSerializer.Serializer, version)),
		scheme.Codecs.WithoutConversion().EncoderForVersion(info.Serializer, nil),
	)
	for _, object := range objects {
		check(encoder.Encode(&watch.Event{Type: watch.Added, Object: object}))
	}
	return stream.Bytes()
}

// Writes the bodies to one file.
func bodies(path string) {
	const secrets, others = "/api/v1/namespaces/ns/secrets", "/api/v1/namespaces/ns/pods"
	check(metav1.AddMetaToScheme(scheme.Scheme))
	pod := &corev1.Pod{ObjectMeta: meta("p"), Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "shown"}}}}
	partial := &metav1.PartialObjectMetadata{ObjectMeta: meta("s")}
	list := &corev1.List{Items: []runtime.RawExtension{{Raw: encoded(configMap("m"))}, {Raw: encoded(secret("s"))}}}
	revision := &appsv1.ControllerRevision{
		ObjectMeta: metav1.ObjectMeta{Name: "r"}, Data: runtime.RawExtension{Raw: []byte(`{"kind":"Secret","stringData":{"a":"` + canary + `"}}`)},
	}
	all := []body{
		{Name: "a Secret", Path: secrets + "/s", Body: encoded(secret("s"))},
		{Name: "a Secret elsewhere", Path: others, Body: encoded(secret("s"))},
		{Name: "a SecretList", Path: secrets, Body: encoded(&corev1.SecretList{Items: []corev1.Secret{*secret("s"), *secret("t")}})},
		{Name: "metadata of Secrets", Path: secrets, Body: encoded(&metav1.PartialObjectMetadataList{Items: []metav1.PartialObjectMetadata{*partial}})},
		{Name: "a Status", Path: others, Body: encoded(&metav1.Status{Status: "Failure", Message: "shown", Code: 404})},
		{Name: "a List", Path: others, Body: encoded(list)},
		{Name: "a TokenRequest", Path: "/api/v1/namespaces/ns/serviceaccounts/a/token", Body: encoded(&authenticationv1.TokenRequest{
			ObjectMeta: meta("a"), Spec: authenticationv1.TokenRequestSpec{Audiences: []string{"shown"}},
			Status: authenticationv1.TokenRequestStatus{Token: canary},
		})},
		{Name: "a TokenReview", Path: "/apis/authentication.k8s.io/v1/tokenreviews", Body: encoded(&authenticationv1.TokenReview{
			Spec:   authenticationv1.TokenReviewSpec{Token: canary},
			Status: authenticationv1.TokenReviewStatus{User: authenticationv1.UserInfo{Username: "shown"}},
		})},
		{Name: "a Pod", Path: others + "/p", Body: encoded(pod)},
		{Name: "a DeploymentList", Path: "/apis/apps/v1/namespaces/ns/deployments", Body: encoded(&appsv1.DeploymentList{Items: []appsv1.Deployment{
			{ObjectMeta: metav1.ObjectMeta{Name: "d", Namespace: "ns"}}, {ObjectMeta: meta("e")},
		}})},
		{Name: "a ConfigMap", Path: "/api/v1/namespaces/ns/configmaps/m", Body: encoded(configMap("m"))},
		{Name: "a ControllerRevision", Path: "/apis/apps/v1/namespaces/ns/controllerrevisions/r", Body: encoded(revision)},
		{Name: "a watch of Secrets", Path: secrets, Watch: true, Body: events(secret("s"), partial, secret("t"))},
		{Name: "a watch of Pods", Path: others, Watch: true, Body: events(pod, &metav1.Status{Code: 410, Reason: "Expired"})},
	}
	data, err := json.MarshalIndent(all, "", " ")
	check(err)
	check(os.WriteFile(path, append(data, '\n'), 0o644))
}
